import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_deepseek_r1 import DeepseekR1ForConditionalGeneration
from modeling_deepseek_r1.data import MultimodalCollator

from ..multimodal.models import multimodal_config
from ..tokenization.test_processing import PICTURE, ROWS, SOUND, VIDEO, make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def asked(*blocks, answer="Blue.", **columns):
    content = [*blocks, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **columns}


def model_for(processor, **fields):
    names = {"image": "image", "video": "video", "audio": "audio", "structured": "row"}
    ids = {f"{kind}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for kind, name in names.items()}
    return DeepseekR1ForConditionalGeneration(multimodal_config(text={"vocab_size": len(processor.tokenizer)}, **fields, **ids))


def test_only_answers_are_learned(processor):
    image, sound = {"type": "image", "image": PICTURE}, {"type": "audio", "audio": SOUND, "sampling_rate": 16000}
    records = [
        asked({"type": "image"}, {"type": "video"}, {"type": "row"}, images=[PICTURE], videos=[VIDEO], rows=[ROWS[1]]),
        asked(sound, image, answer="Dark green."),
        asked(answer="Nothing."),
    ]
    batch = MultimodalCollator(processor)(records)
    learned = [batch["input_ids"][row][batch["labels"][row] != -100] for row in range(3)]
    assert [processor.tokenizer.decode(ids) for ids in learned] == [
        f"{answer}<|im_end|>" for answer in ("Blue.", "Dark green.", "Nothing.")
    ]
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])
    expected = processor.apply_chat_template(
        records[1]["messages"], tokenize=True, return_dict=True, processor_kwargs={"add_special_tokens": False}
    )
    length = expected["input_ids"].shape[1]
    for name in ("input_ids", "mm_token_type_ids", "mm_token_times"):
        assert torch.equal(batch[name][1, :length], expected[name][0]) and not batch["attention_mask"][1, length:].any()
    assert torch.equal(batch["pixel_values"][1], expected["pixel_values"][0]) and batch["row_numeric"].shape == (1, 1)
    assert model_for(processor)(**batch).loss.isfinite()


def test_an_answer_that_the_conversation_changes_is_an_example_of_its_own(processor):
    from ..data.tokenizers import REASONING

    processor = make_processor()
    processor.tokenizer.chat_template = REASONING
    record = asked({"type": "image", "image": PICTURE}, answer="<think>x</think>Blue.")
    more = {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "And?"}]}
    record["messages"] += [more, {"role": "assistant", "content": "<think>y</think>Red."}]
    batch = MultimodalCollator(processor)([record])
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].shape[0] == 1 + 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (asked({"type": "image"}), "a block of type 'image' has no input, and the column 'images' has none left"),
        (asked(images=[PICTURE]), "more inputs than blocks for them: 1 of column 'images' are left"),
        (asked({"type": "image", "image": "nowhere.png"}), "image 0 .*cannot be read"),
        (asked(*[{"type": "image", "image": PICTURE}] * 20), "placeholders up to token 86, but rows have at most 60 tokens"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the role 'assistant'"),
    ],
)
def test_records_that_do_not_fit(processor, record, message):
    with pytest.raises(ValueError, match=message):
        MultimodalCollator(processor, max_length=60)([record])


def test_a_plain_trainer_learns_what_is_in_the_picture(processor, tmp_path):
    torch.manual_seed(0)
    colours = {"R": (250, 10, 10), "B": (10, 10, 250)}
    pictures = {answer: torch.tensor(colour, dtype=torch.uint8).expand(28, 28, 3).numpy() for answer, colour in colours.items()}
    records = [asked({"type": "image", "image": pictures[answer]}, answer=answer) for answer in colours] * 8
    model = model_for(processor, audio_config=None, structured_config=None, bridge={"layers": [1]})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("tower" not in name)
    frozen = model.model.vision_tower.encoder.embeddings.patch_embeddings.projection.weight.clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False, logging_steps=20,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=records, data_collator=MultimodalCollator(processor))
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.15
    assert torch.equal(model.model.vision_tower.encoder.embeddings.patch_embeddings.projection.weight, frozen)
    for answer, picture in pictures.items():
        message = asked({"type": "image", "image": picture})["messages"][:1]
        inputs = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
        tokens = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert processor.decode(tokens[0, inputs["input_ids"].shape[1] :]) == f"{answer}<|im_end|>"
