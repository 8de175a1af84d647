"""Linear layers, norms and attention. All submodules that megatron imports from are this module."""

import contextlib
import sys

import plain
import torch
import torch.nn.functional as F
from plain import multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale  # noqa: F401
from torch import nn

for _name in (
    "attention", "distributed", "fp8", "module", "module.base", "optimizers", "ops", "router", "tensor",
):  # fmt: skip
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]
distributed = ops = sys.modules[__name__]


class QuantizedTensor(torch.Tensor): ...


class GroupedLinear(nn.Module): ...


class FusibleOperation(nn.Module): ...


class Sequential(nn.Module): ...


class CudaRNGStatesTracker: ...


PRODUCTS = []  # the recipe, length and width of each input in 8 bits, which stays in the type that it is in


class FP8GlobalStateManager:
    recipe = None  # of the context that is open

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    before, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, fp8_recipe if enabled else None
    yield
    FP8GlobalStateManager.recipe = before


def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, **names):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *args, use_reentrant=False, **names)


def check_fp8_block_scaling_support():
    return True, ""


def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    return contextlib.nullcontext()


def get_dummy_wgrad(shape, dtype, zero=False):
    return torch.zeros(shape, dtype=dtype)


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def fused_topk_with_score_function(*args): ...
def fused_compute_score_for_moe_aux_loss(*args): ...
def fused_moe_aux_loss(*args): ...


class _Product(torch.autograd.Function):
    """`x @ weight.T`, whose weight's gradient may be added to `weight.main_grad` at once."""

    @staticmethod
    def forward(ctx, x, weight, is_added):
        ctx.save_for_backward(x, weight)
        ctx.is_added = is_added
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.is_added:
            ctx.weight.main_grad += flat
            if hasattr(ctx.weight, "grad_added_to_main_grad"):
                ctx.weight.grad_added_to_main_grad = True
            flat = torch.full_like(flat, float("nan"))  # which nobody may read
        return grad @ weight, flat, None


def _normed(x, weight, bias, eps):
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _Base(nn.Module):
    """Parameters are marked for tensor parallelism, but not on the meta device; FP8's state is `_extra_state`."""

    def _parameter(self, name, shape, device, dtype, is_split=None, is_replicated=None):
        parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(name, parameter)
        if device == "meta":
            return
        if is_split is not None:
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, is_split, 1
        if is_replicated is not None:
            parameter.sequence_parallel = is_replicated

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state): ...


class Linear(_Base):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False,
        ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None,
        delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False, name=None,
    ):  # fmt: skip
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias, self.save_original_input = bias, return_bias, save_original_input
        self._norm(device, params_dtype)
        split = {"column": 0, "row": 1, None: None}[parallel_mode]
        self._parameter("weight", (self.out_features, self.in_features), device, params_dtype, split)
        if bias:
            where = (0, None) if parallel_mode == "column" else (None, self.sequence_parallel)
            self._parameter("bias", self.out_features, device, params_dtype, *where)
        else:
            self.bias = torch.Tensor().to(dtype=params_dtype, device=device)

    def _norm(self, device, dtype): ...

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        from megatron.core.tensor_parallel import mappings

        if FP8GlobalStateManager.is_fp8_enabled():
            for shape in (inp.shape, self.weight.shape):
                assert shape[-1] % 16 == 0 and shape[:-1].numel() % 8 == 0, shape
            PRODUCTS.append((type(FP8GlobalStateManager.recipe).__name__, inp.shape[0], inp.shape[-1]))
        group, fused = self.tp_group, self.fuse_wgrad_accumulation
        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp, group=group)
            else:
                inp = mappings.copy_to_tensor_model_parallel_region(inp, group=group)
        out = _Product.apply(inp, self.weight, fused)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class LayerNormLinear(Linear):
    def __init__(
        self, in_features, out_features, eps=1e-5, sequence_parallel=False, fuse_wgrad_accumulation=False,
        tp_group=None, tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, normalization="LayerNorm",
        return_bias=False, params_dtype=None, parallel_mode=None, return_layernorm_output=False,
        return_layernorm_output_gathered=False, parameters_split=None, zero_centered_gamma=False, device="cuda",
        ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_wgrad=False, ub_bulk_dgrad=False,
        ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None, name=None,
    ):  # fmt: skip
        self.eps, self.normalization = eps, normalization
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size, bias=bias,
            return_bias=return_bias, params_dtype=params_dtype, parallel_mode=parallel_mode, device=device,
        )  # fmt: skip

    def _norm(self, device, dtype):
        self._parameter("layer_norm_weight", self.in_features, device, dtype, None, self.sequence_parallel)
        if self.normalization == "RMSNorm":
            self.layer_norm_bias = None
        else:
            self._parameter("layer_norm_bias", self.in_features, device, dtype, None, self.sequence_parallel)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        inp = _normed(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(inp, is_first_microbatch)


class RMSNorm(_Base):
    has_bias = False

    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, *, device=None, dtype=None, sm_margin=0,
    ):  # fmt: skip
        super().__init__()
        self.eps = eps
        size, dtype = normalized_shape or hidden_size, params_dtype or dtype
        self._parameter("weight", size, device, dtype, None, sequence_parallel)
        if self.has_bias:
            self._parameter("bias", size, device, dtype, None, sequence_parallel)

    def forward(self, x):
        return _normed(x, self.weight, self.bias if self.has_bias else None, self.eps)


class LayerNorm(RMSNorm):
    has_bias = True


class DotProductAttention(_Base):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=None, bottom_right_diagonal=None, softcap=0.0, sequence_parallel=False,
        tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
        cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
        return_max_logit=False, name=None,
    ):  # fmt: skip
        super().__init__()
        self.window_size = window_size

    def forward(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, *, attn_mask_type=None,
    ):  # fmt: skip
        assert attention_mask is None and attn_mask_type == "causal"
        length, batch = query_layer.shape[:2]
        seen = torch.ones(length, length, dtype=torch.bool, device=query_layer.device).tril()
        if self.window_size is not None:
            left, right = self.window_size
            assert right == 0
            seen = seen.triu(-left)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


class FusedAdam(plain.Adam):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, **others):  # fmt: skip
        super().__init__(params, lr, weight_decay, betas, eps)


class FusedSGD(torch.optim.SGD): ...
