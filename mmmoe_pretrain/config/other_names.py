"""Settings under the names that other frameworks give them, or in a section where a user may look for them first.

Read for the error about an unknown key alone: none of these names is accepted.
"""

from __future__ import annotations

OUR_KEYS: dict[str, tuple[str, ...]] = {
    "optimizer.learning_rate": ("lr", "max_lr", "base_lr", "learning_rate"),
    "optimizer.min_learning_rate": ("min_lr", "lr_min", "min_learning_rate"),
    "optimizer.warmup_steps": ("warmup", "warmup_steps", "warmup_iters", "lr_warmup_iters", "num_warmup_steps"),
    "optimizer.schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule", "lr_decay_style"),
    "optimizer.decay_steps": ("lr_decay_iters", "lr_decay_steps"),
    "optimizer.weight_decay": ("wd", "weight_decay"),
    "optimizer.clip_norm": ("clip_grad", "grad_clip", "max_grad_norm", "max_norm", "gradient_clipping"),
    "optimizer.beta1": ("adam_beta1",),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.beta1 and optimizer.beta2": ("betas", "adam_betas"),
    "optimizer.eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "train.steps": (
        "epochs", "num_epochs", "num_train_epochs", "max_steps", "num_steps", "train_steps", "train_iters",
        "max_iters",
    ),
    "train.global_batch_size": ("batch_size", "bs", "train_batch_size", "global_batch_size", "gbs"),
    "train.global_batch_size and train.num_microbatches": (
        "micro_batch_size", "microbatch_size", "mbs", "local_batch_size", "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    "train.num_microbatches": (
        "gradient_accumulation_steps", "grad_accum", "grad_accumulation_steps", "accumulation_steps", "accumulate",
        "num_microbatches",
    ),
    "train.precision": ("dtype", "torch_dtype", "bf16", "fp16", "amp", "mixed_precision", "precision"),
    "train.recompute": (
        "recompute", "recompute_granularity", "activation_checkpointing", "activation_checkpoint",
        "gradient_checkpointing",
    ),
    "train.compile": ("torch_compile", "compile"),
    "train.log_every": ("log_interval", "logging_steps", "log_freq", "log_every"),
    "train.profile": ("profiler", "profiling", "profile"),
    "checkpoint.every": ("save_interval", "save_steps", "save_every", "checkpoint_interval", "checkpoint_every"),
    "checkpoint.keep_last": ("save_total_limit", "keep_last", "max_checkpoints", "keep_latest_k"),
    "evaluate.every": ("eval_interval", "eval_steps", "eval_every", "val_interval"),
    "runs_dir and name": ("output_dir", "out_dir", "save_dir", "work_dir", "run_dir"),
    "name": ("run_name", "exp_name", "experiment_name"),
    "seed": ("random_seed", "seed"),
    "trackers": ("report_to", "loggers", "wandb", "mlflow"),
    "data.num_workers": ("workers", "num_workers", "dataloader_num_workers"),
    "data.tokenizer": ("tokenizer", "tokenizer_path", "tokenizer_model"),
    "parallel.data_parallel_size": ("dp", "dp_size", "data_parallel_size", "data_parallel_degree"),
    "parallel.tensor_parallel_size": (
        "tp", "tp_size", "tensor_parallel_size", "tensor_parallel_degree", "tensor_model_parallel_size",
    ),
    "parallel.pipeline_parallel_size": (
        "pp", "pp_size", "pipeline_parallel_size", "pipeline_parallel_degree", "pipeline_model_parallel_size",
    ),
    "parallel.virtual_pipeline_size": (
        "vpp", "vp", "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank",
    ),
    "parallel.expert_parallel_size": (
        "ep", "ep_size", "expert_parallel_size", "expert_parallel_degree", "expert_model_parallel_size",
    ),
    "parallel.expert_tensor_parallel_size": ("etp", "expert_tensor_parallel_degree"),
    "parallel.context_parallel_size": ("cp", "cp_size", "context_parallel_size", "context_parallel_degree"),
    "parallel.sequence_parallel": ("sp", "sequence_parallel"),
    "parallel.zero_stage": ("zero", "zero_stage", "stage", "zero_optimization", "use_distributed_optimizer", "fsdp"),
    "parallel.engine": ("engine", "backend"),
    "model.hidden_size": ("dim", "d_model", "n_embd", "embed_dim", "width", "hidden_size"),
    "model.num_layers": ("n_layers", "n_layer", "depth", "num_hidden_layers", "num_layers"),
    "model.num_heads": ("n_heads", "n_head", "heads", "num_attention_heads"),
    "model.num_kv_heads": ("n_kv_heads", "num_key_value_heads", "num_query_groups"),
    "model.ffn_hidden_size": ("d_ff", "ffn_dim", "intermediate_size", "ffn_hidden_size"),
    "model.rotary_base": ("rope_theta", "rope_base"),
    "moe.num_experts": ("n_experts", "num_moe_experts", "num_local_experts", "n_routed_experts", "num_experts"),
    "moe.experts_per_token": (
        "top_k", "topk", "k", "num_experts_per_tok", "moe_router_topk", "router_topk", "experts_per_token",
    ),
    "moe.expert_hidden_size": ("moe_ffn_hidden_size", "moe_intermediate_size", "expert_hidden_size"),
    "moe.shared_expert_hidden_size": ("n_shared_experts", "moe_shared_expert_intermediate_size", "shared_experts"),
    "moe.capacity_factor": ("moe_expert_capacity_factor", "expert_capacity_factor", "capacity_factor"),
    "moe.lending": ("redundant_experts", "num_redundant_experts", "enable_eplb", "least_loaded"),
    "moe.every": ("moe_layer_freq", "moe_frequency"),
    "moe.losses.balance": (
        "aux_loss", "aux_loss_coef", "aux_loss_coeff", "moe_aux_loss_coeff", "router_aux_loss_coef",
    ),
    "moe.losses.z": ("z_loss", "z_loss_coeff", "moe_z_loss_coeff", "router_z_loss_coef"),
}  # fmt: skip
OURS = {theirs: ours for ours, names in OUR_KEYS.items() for theirs in names}
