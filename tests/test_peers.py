"""The formulas against numbers of other engines' own tests: the same ones, or what is known to differ and why.

The numbers of a row are facts from the test that it names; the calls are this engine's. "By hand" is a formula of a
peer's source, worked out for the row. Where a test stands:

SkyRL (NovaSky-AI/SkyRL): tests/backends/skyrl_train/utils/test_ppo_utils.py, tests/train/algorithms/test_losses.py,
    skyrl-train/tests/cpu/algorithms/test_off_policy_correction.py
NeMo-RL (NVIDIA-NeMo/RL): tests/unit/algorithms/test_loss_functions.py, test_utils.py, test_gae.py,
    test_reward_functions.py, test_advantage_estimator.py and data/clipped_pg_loss_goldens.json
verl (verl-project/verl): tests/trainer/ppo/test_core_algos_on_cpu.py, test_loss_aggregation_on_cpu.py,
    test_standard_ppo_on_cpu.py, test_rollout_corr.py, test_kl_reward_on_cpu.py
OpenRLHF: tests/test_loss_aggregation.py, test_reward_shaping.py, test_experience_maker.py, test_length_penalty.py,
    test_kl_controller.py, test_kl_estimator_gradient.py, test_preference_eval.py
torchtune (pytorch/torchtune): tests/torchtune/rlhf/test_rewards.py, loss/test_ppo_loss.py, loss/test_dpo_loss.py
tianshou (thu-ml/tianshou): test/base/test_returns.py
TRL (huggingface/trl): tests/test_core.py, tests/test_rewards.py; 1.12's grpo_trainer.py and dpo_trainer.py by hand
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as kernels
from rlhf_engine.algorithms.policy import averaging
from rlhf_engine.algorithms.ppo import advantage
from rlhf_engine.algorithms.rollouts import overlong
from rlhf_engine.config import PPOConfig, RunConfig
from rlhf_engine.context import TrainState
from rlhf_engine.observing.metrics import Metrics

NAN = math.nan


def wide(x):
    return torch.tensor(x, dtype=torch.float64)


def by_name(rows):
    """Parametrises a test by rows whose first entry says where they are from, which is their id too."""
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in rows]


def near(found, wanted, rel=1e-6, abs=1e-9):
    torch.testing.assert_close(torch.as_tensor(found).double(), wide(wanted), rtol=rel, atol=abs)


# -- what a score is compared with --------------------------------------------------------------------------------

GROUPS = [  # scores, groups, kind, options, advantages
    ("SkyRL rloo_outcome_advantage_basic", [6, 3, 9, 12, 1], [0, 0, 1, 1, 2], "rloo", {}, [3, -3, -3, 3, 0]),
    ("SkyRL grpo_outcome_advantage_norm_std_false", [6, 3, 9, 12], [0, 0, 1, 1], "dr_grpo", {}, [1.5, -1.5, -1.5, 1.5]),
    # test_utils.py has baselines: 2.5, 2, 1.5 and so on, taken off here
    ("NeMo-RL baseline_per_prompt_basic", [1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1], "rloo", {}, [-1.5, 0, 1.5] * 2),
    ("NeMo-RL baseline_single_generation", [2.5, 4], [0, 1], "rloo", {}, [0, 0]),
    ("NeMo-RL baseline_mixed_prompt_sizes", [1, 2, 4, 5, 6], [0, 0, 1, 1, 1], "rloo", {}, [-1, 1, -1.5, 0, 1.5]),
    ("NeMo-RL baseline_identical_rewards", [3, 3, 3, 7, 7, 7], [0, 0, 0, 1, 1, 1], "grpo", {}, [0] * 6),
    ("OpenRLHF reward_shaping dr_grpo", [0, 0, 0, 1], [0] * 4, "dr_grpo", {}, [-0.25, -0.25, -0.25, 0.75]),
    ("OpenRLHF reward_shaping rloo", [0, 0, 0, 1], [0] * 4, "rloo", {}, [-1 / 3, -1 / 3, -1 / 3, 1]),
    ("OpenRLHF reward_shaping group_norm", [0, 0, 0, 1], [0] * 4, "grpo", {"eps": 1e-9}, [-0.5, -0.5, -0.5, 1.5]),
    ("OpenRLHF constant_rewards", [0, 0], [0, 0], "grpo", {"eps": 1e-9}, [0, 0]),
    ("OpenRLHF baseline_uses_valid_siblings_only", [1, 3], [0, 0], "dr_grpo", {}, [-1, 1]),
    ("TRL grpo by hand", [1, 0, 0, 1], [0] * 4, "grpo", {"eps": 1e-4},
     [0.86587543, -0.86587543, -0.86587543, 0.86587543]),
    # verl's masked_whiten over tokens, 1 and 3 of them: mean 0.5, and variance 1 of N - 1
    ("verl reinforce++ by hand", [2, 0], [0, 1], "reinforce++", {"counts": [1, 3]}, [1.5, -0.5]),
    ("verl reinforce++_baseline by hand", [2, 0, 5, 3], [0, 0, 1, 1], "reinforce++_baseline", {},
     [0.8660254, -0.8660254, 0.8660254, -0.8660254]),
    # NeMo-RL and OpenRLHF divide by N there
    ("NeMo-RL reinforce++_baseline by hand", [2, 0, 5, 3], [0, 0, 1, 1], "reinforce++_baseline", {"correction": 0},
     [1, -1, 1, -1]),
]  # fmt: skip


@pytest.mark.parametrize(("scores", "groups", "kind", "options", "wanted"), by_name(GROUPS))
def test_group_advantages(scores, groups, kind, options, wanted):
    options = {name: torch.tensor(x) if name == "counts" else x for name, x in options.items()}
    near(kernels.group_advantages(wide(scores), torch.tensor(groups), kind, **options), wanted, rel=3e-6)


GROUPS_OTHERWISE = [  # ours, theirs, in what
    # the std, as the mean, is that of the others; where it is 0 nothing is divided
    ("NeMo-RL grpo leaves one out", [1, 2, 3], "grpo", [-1, 0, 1], [-2.1213203, 0, 2.1213203]),
    # a response alone in its group is compared with nothing
    ("verl grpo of one", [0.7], "grpo", [0], [0.7]),
    ("verl rloo of one", [0.7], "rloo", [0], [0.7]),
]


@pytest.mark.parametrize(("scores", "kind", "ours", "theirs"), by_name(GROUPS_OTHERWISE))
def test_group_advantages_that_differ(scores, kind, ours, theirs):
    found = kernels.group_advantages(wide(scores), torch.zeros(len(scores), dtype=torch.int64), kind)
    near(found, ours, rel=3e-6)
    assert not torch.allclose(found, wide(theirs))


# -- returns, advantages and whitening ----------------------------------------------------------------------------


def gae(rewards, values, gamma, lam, mask=None):
    """With a reward at each token."""
    rewards, values = torch.tensor(rewards), torch.tensor(values)
    mask = torch.ones_like(rewards) if mask is None else torch.tensor(mask)
    none = torch.zeros_like(rewards)
    return kernels.kl_advantages(none, none, values, rewards, mask, kl_coef=0.0, gamma=gamma, gae_lambda=lam)


REWARDS, VALUES = [[1.0, 2, 3]], [[0.5, 1, 1.5]]
EPISODES = [[101.0, 102, 103, 200], [104, 105, 106, 201], [107, 108, 109, 202]]
STATES = [[0.0, 2, 3, 4], [0, 5, 6, 7], [0, 8, 9, 10]]  # tianshou has those of the states after, 2, 3, 4, -1, ...
ENDS = [[454.8344, 376.1143, 291.298, 200], [464.5610, 383.1085, 295.387, 201], [474.2876, 390.1027, 299.476, 202]]
CUT = [[454.0109, 375.2386, 290.3669, 199.01], [462.9138, 381.3571, 293.5248, 199.02]]
RETURNS = [  # rewards, values, gamma, lambda, returns
    ("SkyRL gae_advantage_return", REWARDS, VALUES, 1.0, 1.0, [[6, 5, 3]]),
    ("SkyRL gae_advantage_return_gamma", REWARDS, VALUES, 0.5, 1.0, [[2.75, 3.5, 3]]),
    ("SkyRL gae_advantage_return_lam", REWARDS, VALUES, 1.0, 0.5, [[3.625, 4.25, 3]]),
    ("SkyRL reinforce_plus_plus_gamma", REWARDS, [[0.0] * 3], 0.5, 1.0, [[2.75, 3.5, 3]]),
    ("torchtune estimate_returns", [[0.0, 0, 0, 1]], [[0.0, 0, 0, 1]], 0.9, 0.95, [[0.6579225, 0.7695, 0.9, 1]]),
    ("tianshou episodic_returns gamma", [[1.0, 2, 3]], [[0.0] * 3], 0.1, 1.0, [[1.23, 2.3, 3]]),
    ("tianshou episodic_returns gamma 2", [[3.0, 4, 5]], [[0.0] * 3], 0.1, 1.0, [[3.45, 4.5, 5]]),
    ("tianshou episodic_returns gae", EPISODES, STATES, 0.99, 0.95, ENDS),
    # an end by a time limit is an end here, and 0 after it; theirs has the value there, -1 and -2, in the last reward
    ("tianshou episodic_returns truncated", [[101.0, 102, 103, 199.01], [104, 105, 106, 199.02]], STATES[:2], 0.99,
     0.95, CUT),
]  # fmt: skip


@pytest.mark.parametrize(("rewards", "values", "gamma", "lam", "wanted"), by_name(RETURNS))
def test_returns(rewards, values, gamma, lam, wanted):
    near(gae(rewards, values, gamma, lam).returns, wanted, rel=2e-6)


def test_advantages_across_turns():
    """verl, test_multi_turn_compute_gae_advantage_return, at gamma and lambda 1 by hand: tokens that are not the
    policy's are passed over, whatever stands there."""
    rewards, values = [[0.1, 0.1, 0.1, 0.1, 1.0]], [[4.0, 5, 6, 7, 9]]
    near(gae(rewards, values, 1.0, 1.0).advantages, [[-2.6, -3.7, -4.8, -5.9, -8]], rel=2e-6)
    for other in (-1.0, NAN):
        rewards, values = [[0.1, 0.1, 0.1, other, 0.1, 1.0]], [[4.0, 5, 6, other, 7, 9]]
        found = gae(rewards, values, 1.0, 1.0, [[1, 1, 1, 0, 1, 1]])
        near(found.advantages, [[-2.6, -3.7, -4.8, 0, -5.9, -8]], rel=2e-6)


def test_rewards_with_a_kl():
    """torchtune, test_get_rewards_ppo; verl, test_apply_kl_penalty_masks_invalid_logprob_nans_on_cpu."""
    log_probs = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]])
    references = torch.tensor([[0.2, 0.3, 0.4], [0.6, 0.7, 0.8], [0.9, 1.0, 1.1]])
    none, scores = torch.zeros(3, 3), torch.tensor([1.0, 2, 3])
    found = kernels.kl_advantages(log_probs, references, none, scores, torch.ones(3, 3), kl_coef=0.5, gamma=0.0)
    wanted = [[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]]  # without discount an advantage is its reward
    near(found.advantages, wanted)
    near(found.rewards, [sum(row) for row in wanted])
    log_probs, mask = torch.tensor([[0.0, NAN]]), torch.tensor([[1, 0]])
    found = kernels.kl_advantages(log_probs, log_probs, log_probs, torch.ones(1), mask, kl_coef=0.1)
    assert found.rewards.tolist() == [1.0]


def test_two_lambdas():
    """NeMo-RL, test_gae_public_path_preserves_rewards_whitening_and_decoupling, its second row by hand."""
    log_probs, values, scores = -torch.ones(1, 3), torch.tensor([[0.1, 0.3, 0.5]]), torch.tensor([-0.5])
    found = [
        kernels.kl_advantages(
            log_probs, log_probs - 0.2, values, scores, torch.ones(1, 3), kl_coef=0.1, gae_lambda=mixture
        )
        for mixture in (0.6, 1.0)
    ]
    near(found[0].advantages, [[-0.0792, -0.432, -1.02]])
    near(found[1].returns, [[-0.56, -0.54, -0.52]])


WHITENED = [  # x, mask, whitened
    ("SkyRL gae_with_masking", [[5.5, 4, 1.5]], [[1, 0, 1]], [[0.70710678, 0, -0.70710678]]),
    ("TRL masked_whiten", [[1.0, 2, 3, 4]], [[0, 1, 1, 0]], [[0, -0.70710678, 0.70710678, 0]]),
    ("torchtune masked_var", [[1.0, 2, 3, 4, 5]], [[1, 1, 1, 0, 0]], [[-1, 0, 1, 0, 0]]),
]


@pytest.mark.parametrize(("x", "mask", "wanted"), by_name(WHITENED))
def test_whitening(x, mask, wanted):
    """They divide by N - 1. Without a correction it is N, as OpenRLHF has it, and the result's variance is 1."""
    near(kernels.whiten(torch.tensor(x), torch.tensor(mask), correction=1), wanted, rel=2e-6)
    found = kernels.whiten(torch.tensor(x), torch.tensor(mask))
    count = sum(mask[0])
    near(found, [[value * (count / (count - 1)) ** 0.5 for value in wanted[0]]], rel=2e-6)


def ppo(settings, state, kl, scores):
    """What PPO's stage makes of responses of one token, whose values are 0."""
    zeros, ones = torch.zeros(len(scores), 1), torch.ones(len(scores), 1, dtype=torch.bool)
    x = SimpleNamespace(
        log_probs=zeros + kl, ref_log_probs=zeros, values=zeros, scores=torch.tensor(scores), finished=ones[:, 0],
        response_mask=ones, lengths=ones.sum(1),
    )  # fmt: skip
    known = {"metrics": Metrics(), "mesh": SimpleNamespace(device=torch.device("cpu")), "config": RunConfig()}
    return advantage(SimpleNamespace(settings=settings, state=state, **known), None, x)


@pytest.mark.parametrize(("correction", "variance"), [(0, 4.0), (1, 8.0)])
def test_the_variance_that_ppo_whitens_by(correction, variance):
    found = ppo(PPOConfig(std_correction=correction), TrainState(), 0.0, [5.5, 1.5])
    assert found["advantage_moments"].tolist() == [2.0, 3.5, variance]


# -- losses of the policy -----------------------------------------------------------------------------------------


def policy(log_probs, old, advantages, mask=None, over="tokens", length=1, **options):
    """The loss as a mean, and the gradient of each log-prob."""
    x = wide(log_probs).requires_grad_()
    mask = torch.ones(x.shape, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    weights, count = averaging(mask, over, length)
    loss = kernels.clipped_policy_loss(x, wide(old), wide(advantages), mask, weights=weights, **options).loss / count
    loss.backward()
    return loss.detach(), x.grad


# of NeMo-RL's goldens: the tokens that are learned, and what they are computed from
MASK = [[1, 1, 1, 0], [1, 1, 0, 0]]
NEW = [[-1.6, -0.8, -1.1, -1.4], [-0.7, -1.4, -0.9, -1.2]]
OLD = [[-1.0, -1.1, -0.8, -1.3], [-0.9, -1.0, -1.2, -0.8]]
SAMPLED = [[-1.2, -1.5, -0.7, -1.1], [-1.4, -0.7, -1.3, -1.0]]
GAINS = [[1.2, -0.7, 0.4, 2.0], [-1.1, 0.6, 1.5, -0.3]]
FAR = [[-1.0, -3.0, -0.8, -1.3], OLD[1]]


def golden(old=OLD, importance=None, **options):
    advantages = wide(GAINS)
    if importance is not None:
        advantages = advantages * kernels.importance_weights(wide(OLD), wide(SAMPLED), wide(MASK), **importance)
    return policy(NEW, old, advantages.tolist(), MASK, **options)


GOLDENS = [  # options, loss, gradient within the mask
    ("ppo_token", {}, 0.18627018364, [-0.1317147924, 0.1889802327, -0.0592654575, 0.2687086063, -0.0804384054]),
    ("reinforce", {"kind": "reinforce"}, 0.373999999252, [-0.24, 0.14, -0.08, 0.22, -0.12]),
    ("force_on_policy", {"old": NEW}, -0.08, [-0.24, 0.14, -0.08, 0.22, -0.12]),
    ("dual_clip", {"old": FAR, "dual_clip": 3.0}, 0.41728995012,
     [-0.1317147924, 0, -0.0592654575, 0.2687086063, -0.0804384054]),
    ("cispo_with_token_is", {"kind": "cispo", "importance": {"limit": math.inf}}, 0.03329652014,
     [-0.2345093291, 0.2506265487, -0.0579095946, 0.4352624146, -0.0711185490]),
    ("tis_token", {"importance": {"limit": 1.3, "low": 0.7}}, 0.32090283998,
     [-0.1608768107, 0.2456743025, -0.0536256036, 0.3493211881, -0.0595902363]),
    ("icepop_token", {"importance": {"kind": "masked", "limit": 1.25, "low": 0.75}}, -0.21450241430,
     [-0.1608768107, 0, -0.0536256036, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "loss", "grad"), by_name(GOLDENS))
def test_losses_of_nemo_rl(options, loss, grad):
    """clipped_pg_loss_goldens.json, which divides by a count of 5 and 1e-8."""
    found, slopes = golden(**options)
    near(found, loss)
    near(slopes[wide(MASK).bool()], grad)
    assert not slopes[~wide(MASK).bool()].any()


def test_gspo_of_nemo_rl():
    """gspo_sequence_is of the same file: the same loss. Its gradient is that of the sequence's ratio, in which all
    tokens share the mean of their advantages; here each has its own, as in the paper's eq. 14, of the same sum."""
    loss, slopes = golden(kind="gspo", over="sequences", importance={"of": "sequences", "limit": math.inf})
    near(loss, -0.06433245613699731)
    near(slopes.sum(1), [3 * -0.06749293963637779, 2 * 0.06907318137816686])
    near(slopes[0, :3] / slopes[0].sum(), [4 / 3, -7 / 9, 4 / 9])  # 1.2, -0.7 and 0.4 of 0.9


STEPS = [[-1.69315, -1.0, -0.59453]], [[-1.0] * 3], [[1.0, -1, 2]]  # ratios 0.5, 1, 1.5
LEAPS = [[-1.69315, -1.0, -0.69741]], [[-1.0, -1, -3]], [[1.0, -1, -4]]  # 0.5, 1, 10
TWO = [STEPS[0][0]] * 2, [[-1.0] * 3, [-2.0] * 3], [STEPS[2][0]] * 2
ONE = [[math.log(10)]], [[0.0]], [[-1.0]]
HIGH, RISEN = [[1.5, 1.8, 2.2]], [[0.5, 0.8, 1.2]]
LOSSES = [  # log-probs, old ones and advantages, options, loss
    ("NeMo-RL ppo_clipping", STEPS, {}, -0.6333333),
    ("NeMo-RL reinforce_mode", ([[-0.5, -1, -1.5]], [[0.0] * 3], STEPS[2]), {"kind": "reinforce"}, 0.8333333),
    ("NeMo-RL gspo", STEPS, {"kind": "gspo", "over": "sequences"}, -0.6057),
    ("NeMo-RL gspo_batch_size_2", TWO, {"kind": "gspo", "over": "sequences"}, -0.4912),
    ("NeMo-RL dual_clip", LEAPS, {"dual_clip": 3.0}, 4.1666667),
    ("SkyRL policy_loss_dual_clip", LEAPS, {"dual_clip": 3.0}, 12.5 / 3),  # theirs are sums
    ("SkyRL policy_loss_cispo", LEAPS, {"kind": "cispo"}, -2.993048 / 3),
    ("verl vanilla_without_dual_clip", ONE, {}, 10),
    ("verl vanilla_dual_clip", ONE, {"dual_clip": 3.0}, 3),
    # the tolerance of its two other tests, 1e6 times the size, lets values of the wrong sign pass
    ("torchtune policy_loss_clipped_for_high_logprobs", (HIGH, RISEN, [[1.0] * 3]), {}, -1.2),
    # clamp(ratio, max=epsilon_high): the bound itself, without a lower one
    ("TRL cispo epsilon_high=5 by hand", LEAPS, {"kind": "cispo", "clip_ratio": 1.0, "clip_ratio_high": 4.0},
     -(-0.5 * 1.69315 + 1 + 5 * 4 * 0.69741) / 3),
    ("TRL delta=3 by hand", LEAPS, {"dual_clip": 3.0}, 12.5 / 3),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "options", "wanted"), by_name(LOSSES))
def test_policy_losses(tokens, options, wanted):
    near(policy(*tokens, **options)[0], wanted, rel=1e-4)


def test_gspo_of_skyrl():
    """test_gspo_sequence_level_golden, whose loss is a sum, without importance and with that of tokens."""
    new = [[-0.9, -1.4, -0.2, -2.1, -1.0], [-1.1, -1.5, -1.9, -0.9, -1.5], [-1.6, 0.0, -0.4, -0.6, -0.2],
           [-0.7, -0.3, -1.0, -0.45, -0.65], [-0.9, -1.0, -1.1, -1.15, -0.8]]  # fmt: skip
    old = [[-1.0, -1.0, -0.5, -1.8, -1.0], [-0.6, -0.9, -1.5, -0.4, -1.0], [-1.2, -0.5, -0.9, -1.0, -0.9],
           [-1.1, -0.8, -1.3, -0.9, -1.0], [-0.5, -0.7, -0.6, -0.8, -1.0]]  # fmt: skip
    drawn = [[-1.1, -0.9, -0.6, -1.7, -1.0], [-0.6, -1.0, -1.4, -0.4, -1.1], [-1.3, -0.6, -0.8, -1.2, -0.8],
             [-1.0, -0.9, -1.2, -0.8, -1.1], [-0.6, -0.6, -0.7, -0.9, -1.0]]  # fmt: skip
    mask = wide([[1, 1, 1, 1, 0], [1] * 5, [0, 1, 1, 1, 1], [1] * 5, [1, 1, 1, 1, 0]])
    advantages, number = wide([[1.0], [-0.5], [2.0], [-1.0], [0.8]]) * mask, 22
    options = {"mask": mask.tolist(), "kind": "gspo", "clip_ratio": 0.2, "clip_ratio_high": 0.28}
    loss, grad = policy(new, old, advantages.tolist(), **options)
    near(loss * number, -6.663854598999023)
    steep, flat, back = -0.9277434945106510, -0.5430013537406921, 1.491824746131897
    near(grad * number, [[steep] * 4 + [0], [0] * 5, [0] * 5, [back] * 5, [flat] * 4 + [0]])
    weights = kernels.importance_weights(wide(old), wide(drawn), mask, limit=2.0)
    loss, grad = policy(new, old, (advantages * weights).tolist(), **options)
    near(loss * number, -7.2169060707092285)
    near(grad[0] * number, [-1.0253151655, -0.8394569754, -1.0253151655, -0.8394570947, 0])
    near(grad[3] * number, [1.3498587608, 1.6487212181, 1.3498589993, 1.3498588800, 1.6487213373])


# -- over what a loss is a mean -----------------------------------------------------------------------------------

SIX, FOUR = [[1.0, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 0, 0]]
TWELVE, HALF = [[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
SHORT, MASKED = [[1.0, 2], [3, 4]], [[1, 1], [1, 0]]
MEANS = [  # losses of tokens, mask, over what, a constant length, mean
    ("SkyRL token_mean", SIX, FOUR, "tokens", 1, 2.5),
    ("SkyRL sequence_mean", SIX, FOUR, "sequences", 1, 3.0),
    ("SkyRL seq_mean_token_sum_norm", SIX, FOUR, "constant", 4, 1.25),
    ("SkyRL advantages token_mean", SIX, [[1, 1, 0], [1, 1, 1]], "tokens", 1, 3.6),
    ("SkyRL advantages sequence_mean", SHORT, MASKED, "sequences", 1, 2.25),
    ("SkyRL advantages seq_mean_token_sum_norm", [[2.0, 3], [9, 12]], MASKED, "constant", 10, 0.7),
    ("verl seq_mean_token_sum_norm", TWELVE, HALF, "constant", 4, 2.5),
    ("verl seq_mean_token_sum_norm loss_scale_factor", TWELVE, HALF, "constant", 10, 1.0),
    # rows without a token are not counted
    ("verl seq_mean_token_sum_norm_empty_rows", [[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 1, 0], [0] * 3, [1, 0, 0]],
     "constant", 3, 5 / 3),
    ("OpenRLHF token_mean", [[1.0, 2, 0], [3, 4, 5], [7, 0, 0]], [[1, 1, 0], [1] * 3, [1, 0, 0]], "tokens", 1, 22 / 6),
    ("OpenRLHF seq_mean_token_mean", [[1.0, 3, 9], [2, 4, 0], [8, 0, 0]], [[1, 1, 0], [1, 1, 0], [1, 0, 0]],
     "sequences", 1, 13 / 3),
    ("OpenRLHF excludes_fully_masked_sequences", [[1.0, 3], [5, 7]], [[1, 1], [0, 0]], "sequences", 1, 2.0),
    # of two micro-batches of 2 and 5 tokens one mean over the step
    ("OpenRLHF grad_accum_global_norm", [[1.0, 2, 0], [3, 4, 5], [6, 7, 0]], [[1, 1, 0], [1] * 3, [1, 1, 0]],
     "tokens", 1, 4.0),
]  # fmt: skip


@pytest.mark.parametrize(("losses", "mask", "over", "length", "wanted"), by_name(MEANS))
def test_means(losses, mask, over, length, wanted):
    weights, count = averaging(torch.tensor(mask).bool(), over, length)
    near(((wide(losses) * wide(mask)).sum(1) * weights).sum() / count, wanted)


def test_a_mean_of_the_means_of_micro_batches():
    """SkyRL, test_token_mean_legacy: 8.5, which depends on the split; here it is over all tokens."""
    losses, mask = wide([[2, 4], [6, 8], [10, 12], [14, 16]]), wide([[1, 1], [1, 0], [1, 1], [1, 1]])
    weights, count = averaging(mask.bool(), "tokens", 1)
    near(((losses * mask).sum(1) * weights).sum() / count, 64 / 7)


# -- KL -----------------------------------------------------------------------------------------------------------

KLS = [  # log-probs, the reference's, what of each estimate
    ("SkyRL approx_kl", [0.2, 0.3], [0.1, 0.2], {"k1": [0.1, 0.1], "k2": [0.005, 0.005], "k3": [0.0048374, 0.0048374]}),
    ("NeMo-RL calculate_kl", [-1, -1], [0, -15], {"k1": [-1, 14], "k2": [0.5, 98], "k3": [0.7182818, 13.0000008]}),
    ("NeMo-RL kl_penalty", [0, -1, -2], [-1, -1, -1], {"k3": [0.3678794, 0, 0.7182818]}),
    ("OpenRLHF k3_extreme", [-1, -0.1, 0], [0, 0, 0], {"k3": [0.7182818, 0.0051709, 0]}),
    # the gap to a teacher, whose negative is the advantage of distill.kl=token
    ("NeMo-RL opd_metrics", [-1, -1], [0, 0], {"k1": [-1, -1]}),
]


@pytest.mark.parametrize(("log_probs", "references", "wanted"), by_name(KLS))
def test_kl_estimates(log_probs, references, wanted):
    for kind, values in wanted.items():
        near(kernels.kl_estimate(wide(log_probs), wide(references), kind), values, rel=2e-6, abs=1e-6)


def test_kl_estimates_beyond_the_clamps():
    """NeMo-RL, test_calculate_kl: of log-ratios of -14 and -29 it has 14 and 29 (k1), 98 and 420.5 (k2), 13 and 28 (k3)
    without clamps, and 10 for all with its own, 20 on the log-ratio and 10 on the estimate. OpenRLHF has 10 on each
    estimate, verl and SkyRL on k3. Here there is 20 on the log-ratio alone."""
    log_probs, references = wide([-1, -1]), wide([-15, -30])
    for kind, values in {"k1": [14, 20], "k2": [98, 200], "k3": [13.0000008, 19]}.items():
        near(kernels.kl_estimate(log_probs, references, kind), values)


NEWER, REFERENCE = [[-1.2, -0.7]], [[-0.9, -1.1]]  # d = -0.3, 0.4
KL_TERMS = [  # the gradient of 0.3 times the mean
    # the estimate's derivative, and what the estimate itself says of the sampling: together d
    ("NeMo-RL kl_gradient_includes_sampling_term", "k3+", [[-0.045, 0.06]]),
    ("OpenRLHF unbiased_gradient k3 by hand", "k3+", [[-0.045, 0.06]]),
    ("OpenRLHF unbiased_gradient k1 by hand", "k1", [[-0.045, 0.06]]),
    ("OpenRLHF k2 by hand", "k2", [[-0.045, 0.06]]),
    ("verl k3+ by hand", "k3+", [[-0.045, 0.06]]),
    # r k3 differentiated at r = 1, its default (use_bias_correction_kl)
    ("TRL bias_correction_kl by hand", "k3+", [[-0.045, 0.06]]),
    ("TRL without bias_correction_kl by hand", "k3", [[-0.0524788, 0.0494520]]),
]


@pytest.mark.parametrize(("kind", "wanted"), by_name(KL_TERMS))
def test_gradients_of_a_kl_in_the_loss(kind, wanted):
    term = {"ref_log_probs": wide(REFERENCE), "kl": kind, "kl_coef": 0.3}
    near(policy(NEWER, NEWER, [[0.0, 0.0]], **term)[1], wanted, rel=2e-6)


def test_a_kl_in_the_loss():
    """NeMo-RL, test_clipped_pg_loss_kl_penalty."""
    log_probs = [[0.0, -1.0, -2.0]]
    term = {"ref_log_probs": wide([[-1.0, -1, -1]]), "kl": "k3", "kl_coef": 0.1}
    near(policy(log_probs, log_probs, [[0.0] * 3], **term)[0], 0.0362, rel=1e-3)


CONTROLLERS = [  # coefficient, KL, target, coefficient afterwards
    ("SkyRL adaptive_kl_controller_update", 0.2, 0.2, 0.1, 0.204),
    ("OpenRLHF adaptive_kl_controller_updates", 0.1, 1.2, 1.0, 0.102),
]


@pytest.mark.parametrize(("kl_coef", "kl", "target", "wanted"), by_name(CONTROLLERS))
def test_adaptive_coefficients_of_the_kl(kl_coef, kl, target, wanted):
    """Behind 10 samples, with a horizon of 100."""
    state = TrainState(kl_coef=kl_coef)
    ppo(PPOConfig(kl_controller="adaptive", kl_target=target, kl_horizon=100), state, kl, [0.0] * 10)
    near(state.kl_coef, wanted, rel=1e-5)


# -- what the sampler has drawn -----------------------------------------------------------------------------------

DRAWN = [0.5, -0.5, 1.0]  # SkyRL's log-ratios
NINES = [math.log(x) for x in (0.4, 0.8, 6.0)]
WEIGHTS = [  # log-ratios, mask, options, weights
    ("SkyRL tis_ratio_token_level", DRAWN, [1, 1, 1], {"limit": 2.0}, [1.6487213, 0.6065307, 2.0]),
    ("SkyRL tis_ratio_sequence_level", DRAWN, [1, 1, 1], {"of": "sequences", "limit": 5.0}, [2.7182818] * 3),
    ("SkyRL tis_ratio_sequence_level_with_cap", [1, 1, 1], [1, 1, 1], {"of": "sequences", "limit": 5.0}, [5] * 3),
    ("SkyRL tis_ratio_with_mask", DRAWN, [1, 0, 1], {"of": "sequences", "limit": 10.0}, [4.4816891, 0, 4.4816891]),
    ("SkyRL sequence_mask_product", [0.2, 0.1, 0], [1, 1, 1], {"kind": "masked", "of": "sequences"}, [1.3498588] * 3),
    ("SkyRL sequence_mask_product_rejects", [1, 1, 1], [1, 1, 1], {"kind": "masked", "of": "sequences"}, [0] * 3),
    ("NeMo-RL tis_min_bound none", [math.log(x) for x in (0.1, 1, 3)], [1, 1, 1], {}, [0.1, 1, 2]),
    ("NeMo-RL tis_min_bound 0.5", [math.log(x) for x in (0.1, 1, 3)], [1, 1, 1], {"low": 0.5}, [0.5, 1, 2]),
    ("NeMo-RL icepop", [-0.5, 2.5, -0.2], [1, 1, 1], {"kind": "masked", "limit": 5.0, "low": 0.5},
     [0.6065307, 0, 0.8187308]),
    ("verl exact_icepop", NINES, [1, 1, 1], {"kind": "masked", "limit": 5.0, "low": 0.5}, [0, 0.8, 0]),
    ("verl mask_mode low", [-1, -1], [1, 1], {"kind": "masked"}, [0, 0]),
    ("verl mask_mode near", [0.5, 0.5], [1, 1], {"kind": "masked"}, [1.6487213] * 2),
    # above vllm_importance_sampling_clip_max alone, 3 where nothing is said
    ("TRL token_mask by hand", NINES, [1, 1, 1], {"kind": "masked", "limit": 3.0, "low": 0.0}, [0.4, 0.8, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("ratios", "mask", "options", "wanted"), by_name(WEIGHTS))
def test_importance(ratios, mask, options, wanted):
    found = kernels.importance_weights(torch.zeros(1, len(mask)), -wide([ratios]), torch.tensor([mask]), **options)
    near(found[0], wanted)


OVERLONG = [  # lengths, the longest, buffer, penalty, what is lost; NeMo-RL's has one beyond the longest besides
    ("NeMo-RL reward_shaping_with_penalties", [10, 22, 25], 25, 5, 0.5, [0, 0.2, 0.5]),
    ("NeMo-RL reward_shaping_no_penalties", [10, 15, 18], 25, 5, 1.0, [0, 0, 0]),
    ("TRL soft_overlong_punishment", [50, 90], 100, 20, 1.0, [0, 0.5]),
    ("OpenRLHF overlong_penalty", [5, 7], 8, 3, 1.0, [0, 2 / 3]),
    ("OpenRLHF fractional_length_penalty", [2, 1], 2, 1, 0.5, [0.5, 0]),
]


@pytest.mark.parametrize(("lengths", "longest", "buffer", "penalty", "wanted"), by_name(OVERLONG))
def test_overlong_responses(lengths, longest, buffer, penalty, wanted):
    config = RunConfig()
    config.rollout.max_new_tokens = longest
    settings = PPOConfig(overlong_buffer=buffer, overlong_penalty=penalty)
    near(overlong(SimpleNamespace(settings=settings, config=config), torch.tensor(lengths)), wanted)


# -- preferences --------------------------------------------------------------------------------------------------

AHEAD = [0.0, 10, 20]  # torchtune's chosen answers less its rejected ones, less the reference's
PAIRS = [  # loss, chosen less rejected, options, losses
    ("torchtune dpo_loss", "dpo", AHEAD, {"beta": 0.1}, [0.6931472, 0.3132617, 0.1269280]),
    ("torchtune simpo_loss", "simpo", [-0.4, 20, 20], {"beta": 2.0, "margin": 0.5}, [1.5410085, 0, 0]),
    ("NeMo-RL dpo_loss", "dpo", [0.0], {"beta": 0.0}, [0.6931472]),
    ("OpenRLHF preference_eval dpo", "dpo", [1.0, 1, -2], {"beta": 1.0}, [0.3132617, 0.3132617, 2.1269280]),
    ("OpenRLHF cdpo by hand", "cdpo", [1.0], {"beta": 1.0, "label_smoothing": 0.1}, [0.4132617]),
    ("OpenRLHF and TRL ipo by hand", "ipo", [1.0], {"beta": 0.1}, [16.0]),
]


@pytest.mark.parametrize(("kind", "ahead", "options", "wanted"), by_name(PAIRS))
def test_losses_of_pairs(kind, ahead, options, wanted):
    near(kernels.preference_loss(kind, wide(ahead), wide([0.0] * len(ahead)), **options), wanted)


def test_label_smoothing_of_trl():
    """Its `robust` by hand, 0.1882617, is another loss than `cdpo`: the shares are subtracted, over 1 - 2 e."""
    pair = wide([1.0]), wide([0.0])
    kept, turned = (kernels.preference_loss("dpo", *order, beta=1.0) for order in (pair, pair[::-1]))
    near((0.9 * kept - 0.1 * turned) / 0.8, [0.1882617])
    near(kernels.preference_loss("cdpo", *pair, beta=1.0, label_smoothing=0.1), (0.9 * kept + 0.1 * turned).tolist())


def test_pairs_of_a_reward_model():
    """OpenRLHF, test_preference_eval_weights_each_pair_equally."""
    losses = kernels.pairwise_loss(torch.tensor([-1.0, -1, -4]), torch.tensor([-2.0, -2, -2]))
    near(losses.mean(), 0.91781775)


def test_kto_of_torchtune():
    """test_kto_loss, whose KL is below 0 and counts as 0."""
    ratios = wide([0.0, 0.1, -0.9, 0.0, -9.9, -20.9])
    kl = (wide([-1.0, 0.25, 1.0]) - wide([0.4, 0.2, -0.2])).mean().clamp_min(0)
    found = kernels.kto_loss(ratios, torch.arange(6) < 3, kl, beta=0.1)
    near(found, [0.5, 0.4975, 0.5225, 0.5, 0.2709, 0.1101], rel=1e-3)
