"""Trains BLIP-3 class multimodal models from webdataset shards."""

__version__ = "0.1.0"
