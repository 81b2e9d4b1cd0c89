"""Generation beyond a plain `model.generate()`."""

from ..attention.segments import SegmentedCache
from .candidates import CandidateOutput, HierarchicalCandidates, generate_candidates
from .conversation import Conversation
from .evaluators import EmbeddingEvaluator, RewardEvaluator
from .selection import Candidate, PromptCandidates

__all__ = [
    "Candidate",
    "CandidateOutput",
    "Conversation",
    "EmbeddingEvaluator",
    "HierarchicalCandidates",
    "PromptCandidates",
    "RewardEvaluator",
    "SegmentedCache",
    "generate_candidates",
]
