"""Measurements for any transformers causal language model: perplexity, drift, retrieval of planted facts, time and memory."""

from .domains import DomainResult, ExpertLayer, measure_domains
from .drift import DriftResult, kl_drift
from .loading import DTYPES, load_model, load_tokenizer
from .long_documents import document_losses
from .memory import MemoryCell, MemoryResult, measure_memory
from .perplexity import PerplexityResult, PositionBucket, perplexity
from .report import FORMAT_VERSION, check_plot, environment, markdown_table, plot, read_report, write_report
from .retrieval import RetrievalCell, RetrievalResult, retrieval, wilson_interval
from .speed import Measurement, SpeedCell, SpeedResult, cache_bytes, measure_speed
from .text import encode_text, leading_token_id, read_text, standard_library_text, text_digest, token_windows

__all__ = [
    "DTYPES",
    "DomainResult",
    "DriftResult",
    "ExpertLayer",
    "FORMAT_VERSION",
    "Measurement",
    "MemoryCell",
    "MemoryResult",
    "PerplexityResult",
    "PositionBucket",
    "RetrievalCell",
    "RetrievalResult",
    "SpeedCell",
    "SpeedResult",
    "cache_bytes",
    "check_plot",
    "document_losses",
    "encode_text",
    "environment",
    "kl_drift",
    "leading_token_id",
    "load_model",
    "load_tokenizer",
    "markdown_table",
    "measure_domains",
    "measure_memory",
    "measure_speed",
    "perplexity",
    "plot",
    "read_report",
    "read_text",
    "retrieval",
    "standard_library_text",
    "text_digest",
    "token_windows",
    "wilson_interval",
    "write_report",
]
