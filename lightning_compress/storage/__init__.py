"""Storage: the weights of a network in as few bytes as they hold, and back."""

from lightning_compress.storage.archive import ArchiveReader, write_archive
from lightning_compress.storage.coding import Coder
from lightning_compress.storage.model_archive import load_compressed, save_compressed
from lightning_compress.storage.size import ArchiveSize

__all__ = ["ArchiveReader", "ArchiveSize", "Coder", "load_compressed", "save_compressed", "write_archive"]
