"""Evaluators give a text the same score alone and in a batch, and it is the score of the model behind them."""

import pytest
import torch
from transformers import BertConfig, BertModel

from modeling_deepseek_r1 import DeepseekR1ForSequenceClassification
from modeling_deepseek_r1.generation import EmbeddingEvaluator, RewardEvaluator
from tests.models import randomise, tiny_config
from tests.test_conversation import TEMPLATE, word_tokenizer

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w5 w6"]


def classifier(labels: int):
    torch.manual_seed(0)
    return randomise(DeepseekR1ForSequenceClassification(tiny_config("mixed", num_labels=labels)))


def logits(model, text):
    with torch.no_grad():
        return model(word_tokenizer()(text, return_tensors="pt").input_ids).logits[0]


def test_rewards_are_those_of_single_texts(tmp_path):
    model = classifier(1)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    rendered = [f"<s> user w3 </s> <s> assistant {text} </s> " for text in TEXTS]
    expected = [logits(model, text).item() for text in rendered]
    for batch_size in (1, 3, 8):
        evaluator = RewardEvaluator.from_pretrained(str(tmp_path), batch_size=batch_size)
        assert evaluator("w3", TEXTS) == pytest.approx(expected, abs=1e-4)
    evaluator = RewardEvaluator(model, word_tokenizer(None), with_prompt=False)
    assert evaluator("w3", TEXTS) == pytest.approx([logits(model, text).item() for text in TEXTS], abs=1e-4)
    pairs = RewardEvaluator(model, word_tokenizer(None))("w3", TEXTS)
    assert pairs == pytest.approx([logits(model, f"w3 {text}").item() for text in TEXTS], abs=1e-4)


def test_a_classifier_scores_by_one_of_its_labels():
    model = classifier(3)
    expected = [logits(model, text).log_softmax(-1)[2].item() for text in TEXTS]
    for label in (2, "LABEL_2"):
        evaluator = RewardEvaluator(model, word_tokenizer(None), label=label, with_prompt=False)
        assert evaluator("", TEXTS) == pytest.approx(expected, abs=1e-4)
    for label in (None, 3, "good"):
        with pytest.raises(ValueError, match="say which of them is wanted"):
            RewardEvaluator(model, word_tokenizer(None), label=label)


def test_embeddings_are_compared_over_real_tokens():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model, tokenizer = randomise(BertModel(config)).eval(), word_tokenizer(TEMPLATE)

    def embedding(text):
        with torch.no_grad():
            return model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0].mean(0)

    def cosine(text, other):
        return torch.cosine_similarity(embedding(text), embedding(other), dim=0).item()

    evaluator = EmbeddingEvaluator(model, tokenizer, batch_size=2)
    expected = [cosine("w5 w6", text) for text in TEXTS]
    assert expected[3] == pytest.approx(1)
    assert min(expected) < 0.9
    assert evaluator("w5 w6", TEXTS) == pytest.approx(expected, abs=1e-4)
    assert evaluator("w5 w6", [" ", *TEXTS, ""]) == pytest.approx([-1, *expected, -1], abs=1e-4)
    assert evaluator("w5 w6", [""]) == [-1]
    targeted = EmbeddingEvaluator(model, tokenizer, target="w8")
    assert targeted("w5 w6", TEXTS) == pytest.approx([cosine("w8", text) for text in TEXTS], abs=1e-4)


def test_evaluators_refuse_nonsense():
    with pytest.raises(ValueError, match="batch_size=0"):
        RewardEvaluator(classifier(1), word_tokenizer(), batch_size=0)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        EmbeddingEvaluator(classifier(1), tokenizer)
