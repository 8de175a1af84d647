"""What the server of tests/warm.py imports before it forks. No thread may start here, and CUDA may not be touched."""

import gc
import warnings

warnings.simplefilter("ignore")

import hydra  # noqa: F401, E402
import pyarrow.parquet  # noqa: F401, E402
import sentencepiece  # noqa: F401, E402
import torch.distributed.checkpoint  # noqa: E402
import torch.utils.tensorboard  # noqa: F401, E402
import transformers.models.auto.modeling_auto  # noqa: F401, E402

import rlhf_engine.algorithms.jobs  # noqa: E402
import rlhf_engine.launching.compose  # noqa: E402
import rlhf_engine.launching.reference  # noqa: E402
import rlhf_engine.plan.show  # noqa: E402
import rlhf_engine.trainer  # noqa: E402
import rlhf_engine.verify.suite  # noqa: F401, E402

READY = True
gc.freeze()  # the children's collections pass over all of this
