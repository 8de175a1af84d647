"""What megatron asks of transformer-engine, in plain torch: names, signatures and parameters of version 2.20, for
machines that have no GPU to run it on."""

from . import common, pytorch  # noqa: F401

__version__ = "2.20.2"
