"""Training data: files and datasets in, tokenised and packed rows out."""

from .augment import Augmented, WordReplacement, adversarial_loss, jitter_numbers, jitter_rows, series_windows
from .collate import CausalCollator, PackedCollator
from .documents import Documents, DocumentStream
from .encode import ChatEncoder, ClassificationEncoder, TextEncoder, data_task, make_encoder
from .multimodal import MultimodalCollator
from .pack import PackedDocuments, PackedStream, pack_pieces
from .read import Record, Records, open_data

__all__ = [
    "Augmented",
    "CausalCollator",
    "ChatEncoder",
    "ClassificationEncoder",
    "DocumentStream",
    "Documents",
    "MultimodalCollator",
    "PackedCollator",
    "PackedDocuments",
    "PackedStream",
    "Record",
    "Records",
    "TextEncoder",
    "WordReplacement",
    "adversarial_loss",
    "data_task",
    "jitter_numbers",
    "jitter_rows",
    "make_encoder",
    "open_data",
    "pack_pieces",
    "series_windows",
]
