"""The run of XTuner-RLHF's quick start as its users write it: InternLM2 1.8B, helpful-base and harmless-base."""

import torch

END = 92542
POLICY = "internlm/internlm2-chat-1_8b-sft"
REWARD = "internlm/internlm2-chat-1_8b-reward"

one_gpu = dict(
    data=dict(size=1, mode="ddp"),
    tensor=dict(size=1, mode="1d"),
    pipeline=dict(size=1, interleaved_overlap=False),
    sequence=False,
)
training = dict(micro_bsz=1, lr=1e-6, total_steps=1e9, lr_decay_rate=1, loss_type="per_seq")
trained = dict(trainer_type="huggingface", train_kwargs=training, parallel=one_gpu)
frozen = dict(trainer_type="huggingface", parallel=one_gpu)

model_configs = dict(
    actor=dict(
        model_path=POLICY,
        model_type="actor",
        torch_dtype=torch.bfloat16,
        trainer_config=trained,
        generator_config=dict(shared_with_trainer=True),
    ),
    reference=dict(model_path=POLICY, model_type="reference", torch_dtype=torch.bfloat16, trainer_config=frozen),
    critic=dict(model_path=REWARD, model_type="critic", torch_dtype=torch.bfloat16, trainer_config=trained),
    reward=dict(model_path=REWARD, model_type="reward", torch_dtype=torch.bfloat16, trainer_config=frozen),
)

dataset_config = {
    "num_samples_each_epoch": 64,
    "max_seq_len": 1024,
    "random_seed": 1024,
    "ppo_datas": ["Anthropic/hh-rlhf/helpful-base::1.0", "Anthropic/hh-rlhf/harmless-base::0.5"],
}

tokenizer_config = dict(pad_token_id=0, eos_token_id=END, padding_side="left")

rollout_config = dict(
    actor_micro_bs=32,
    reward_micro_bs=32,
    clip_reward_min=-1.5,
    clip_reward_max=1.5,
    max_new_tokens=1024,
    generate_kwargs={
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.9,
        "min_new_tokens": 1,
        "num_beams": 1,
        "early_stopping": True,
        "eos_token_id": END,
        "pad_token_id": 0,
    },
)

repeater_config = dict(
    actor_micro_bs=8,
    ref_micro_bs=8,
    critic_micro_bs=32,
    reward_scale=False,
    fine_grained_rm=False,
    value_ema=False,
    kl_coeff=0.02,
    gamma=1.0,
    gae_lambda=0.95,
    answer_end_id=END,
    norm_adv=True,
)

train_config = dict(
    ppo_minibatch=64,
    value_minibatch=64,
    actor_micro_bs=2,
    critic_micro_bs=2,
    pretrain_step=0,
    save_interval=80,
)
