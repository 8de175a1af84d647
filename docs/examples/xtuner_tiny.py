"""A configuration of XTuner-RLHF for what `+exp=hh_rlhf` leaves of its first two phases: minutes on two CPU cores."""

import torch

ACTOR = "runs/hh_rlhf/sft/hf"
REWARD = "runs/hh_rlhf/reward/hf"
END = 2
SAMPLES = 32
MINIBATCH = SAMPLES // 2

two_replicas = dict(
    data=dict(size=2, mode="deepspeed"), tensor=dict(size=1, mode="1d"), pipeline=dict(size=1), sequence=False
)
frozen = dict(trainer_type="huggingface", parallel=two_replicas)

model_configs = dict(
    actor=dict(
        model_path=ACTOR,
        model_type="actor",
        torch_dtype=torch.float32,
        trainer_config=dict(
            trainer_type="huggingface",
            use_flash_attn=True,
            gradient_checkpointing=False,
            train_kwargs=dict(lr=3e-4, clip_grad_norm=1.0, lr_scheduler="constant"),
            parallel=two_replicas,
        ),
        generator_config=dict(shared_with_trainer=True),
    ),
    reference=dict(model_path=ACTOR, model_type="reference", trainer_config=frozen),
    critic=dict(
        model_path=REWARD,
        model_type="critic",
        head_name="score",
        trainer_config=dict(trainer_type="huggingface", train_kwargs=dict(lr=1e-3), parallel=two_replicas),
    ),
    reward=dict(model_path=REWARD, model_type="reward", head_name="score", trainer_config=frozen),
)

dataset_config = {
    "num_samples_each_epoch": SAMPLES,
    "max_seq_len": 128,
    "random_seed": 1024,
    "sample_strategy": "in_batch",
    "ratio_within_datas": True,
    "ppo_datas": ["prompts.jsonl::1.0", "hh_mini/harmless-base::0.5[META]:default"],
}

tokenizer_config = dict(pad_token_id=0, eos_token_id=END, padding_side="left")

rollout_config = dict(
    actor_micro_bs=32,
    reward_micro_bs=32,
    clip_reward_min=-1.5,
    clip_reward_max=1.5,
    max_new_tokens=64,
    async_reward=True,
    write_to_file=True,
    generate_kwargs=dict(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=1, num_beams=1, early_stopping=True,
        eos_token_id=END, pad_token_id=0,
    ),
)  # fmt: skip

repeater_config = dict(kl_coeff=0.02, gamma=1.0, gae_lambda=0.95, answer_end_id=END, norm_rewards=True, norm_adv=True)

train_config = dict(
    ppo_minibatch=MINIBATCH,
    value_minibatch=MINIBATCH,
    actor_micro_bs=8,
    critic_micro_bs=8,
    policy_learn_time=1,
    value_learn_time=1,
    critic_warmup_step=1,
    ppo_loss_weight=1.0,
    save_interval=4,
    max_train_step=4,
    resume_step=-1,
)
