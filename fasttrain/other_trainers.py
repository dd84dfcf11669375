"""What settings of TRL, Hugging Face's Trainer, PEFT, LLaMA-Factory, ms-swift, Axolotl, OpenRLHF and Unsloth are called in a recipe, or
why they are in none: for the answer to an unknown key."""

from __future__ import annotations

# ours: theirs, wherever they stand
_THEIRS = {
    "model.name": "model_name_or_path pretrained_model_name_or_path model_id_or_path base_model pretrain model_name",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype bf16 fp16 infer_dtype pure_bf16",
    "model.attention": "attn_implementation flash_attn attn_impl flash_attention sdp_attention",
    "model.quantize": "load_in_4bit load_in_8bit quantization_bit quantization_method quant_method quant_bits bnb_4bit_quant_type",
    "model.train_projector": "freeze_multi_modal_projector freeze_aligner",
    "lora": "peft_config use_peft finetuning_type train_type tuner_type adapter",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": (
        "target_modules target_parameters lora_target lora_target_modules lora_target_linear exclude_modules layers_to_transform"
    ),
    "lora.init_from": "adapter_name_or_path adapters lora_model_dir",
    "data.train": "dataset datasets dataset_name train_dataset train_file",
    "data.eval": "eval_dataset val_dataset test_datasets val_size val_set_size split_dataset_ratio",
    "data.image_root": "dataset_dir media_dir image_dir image_folder",
    "data.max_length": "max_prompt_length max_completion_length max_seq_length cutoff_len sequence_len max_len",
    "data.overflow": "truncation_mode truncation_strategy excess_length_strategy",
    "data.limit_pairs": "max_samples",
    "data.workers": "dataloader_num_workers dataset_num_proc preprocessing_num_workers dataset_processes",
    "loss.kind": "loss_type pref_loss ipo",
    "loss.weights": "loss_weights rpo_alpha cpo_alpha pref_ftx nll_loss_coef",
    "loss.beta": "pref_beta dpo_beta rl_beta",
    "loss.label_smoothing": "dpo_label_smoothing",
    "loss.f_divergence": "f_divergence_type",
    "loss.f_alpha": "f_alpha_divergence_coef",
    "loss.router_aux_weight": "router_aux_loss_coef moe_aux_loss_coef",
    "train.output": "output_dir save_path",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "train.pairs_per_step": (
        "per_device_train_batch_size gradient_accumulation_steps train_batch_size batch_size micro_batch_size micro_train_batch_size"
    ),
    "train.tokens_per_pack": "per_device_eval_batch_size eval_batch_size auto_find_batch_size",
    "train.shuffle": "train_sampling_strategy shuffle_dataset disable_shuffling dataset_shuffle train_dataloader_shuffle",
    "train.learning_rate": "lr",
    "train.projector_learning_rate": "aligner_lr mm_projector_lr",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.min_rate": "lr_scheduler_kwargs cosine_min_lr_ratio min_lr_rate min_lr min_lr_ratio",
    "train.warmup_ratio": "lr_warmup_ratio",
    "train.betas": "adam_beta1 adam_beta2",
    "train.eps": "adam_epsilon",
    "train.grad_clip": "max_grad_norm",
    "train.optimizer": "optim",
    "train.gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "train.compile": "torch_compile",
    "train.seed": "data_seed random_state",
    "train.log_every": "logging_steps logging_strategy logging_first_step",
    "train.eval_every": "eval_steps eval_strategy evals_per_epoch",
    "train.checkpoint_every": "save_steps save_strategy saves_per_epoch",
    "train.keep_checkpoints": "save_total_limit",
    "distributed.zero_stage": "deepspeed",
    "track": "report_to use_wandb",
    "--resume": "resume_from_checkpoint",
    "--overwrite": "overwrite_output_dir",
}
OURS = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}

# why, or what instead: theirs
_NONE_OF_OURS = {
    "the command says it: fasttrain dpo or fasttrain sft": "stage rl rlhf_type do_train do_eval do_predict task_type",
    "sft learns the answers of the assistant, and no question": (
        "assistant_only_loss completion_only_loss train_on_prompt train_on_inputs"
    ),
    "packs have no padding, whatever their lengths": (
        "padding_free packing packing_strategy eval_packing neat_packing sample_packing eval_sample_packing packing_samples "
        "group_by_length length_column_name pad_to_multiple_of pad_to_sequence_len"
    ),
    "reference log-probs are computed once and cached, always": "precompute_ref_log_probs precompute_ref_batch_size",
    "the reference is the model as the run begins (lora.init_from: that adapter), and it does not move": (
        "ref_model ref_model_adapters ref_adapters ref_adapter_name model_adapter_name ref_model_init_kwargs reference_free ref_offload "
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
    ),
    "prompts are written by the chat template in the model's own folder, a system turn stands in the row": (
        "template template_type chat_template chat_template_path chat_template_jinja custom_chat_template default_system system"
    ),
    "the base model has no dropout in training, lora.dropout is the adapter's": "disable_dropout",
    "train whole weights with lora: null, the projector alone with model.train_projector": (
        "modules_to_save lora_modules_to_save additional_target unfrozen_parameters trainable_parameters freeze_llm freeze_parameters"
    ),
    "the vision tower stays as it is, except for an adapter where lora.targets names its layers": (
        "freeze_vision_tower freeze_vit vit_lr finetune_vision_layers"
    ),
    "set lora.alpha to the square root of lora.rank times theirs for the same scale": (
        "use_rslora rslora lora_use_rslora peft_use_rslora"
    ),
    "adapters are LoRA of one rank on linear layers, nothing else": (
        "use_dora lora_use_dora peft_use_dora pissa_init init_lora_weights lora_bias bias rank_pattern alpha_pattern "
        "loraplus_lr_ratio lorap_lr_ratio loftq_config trainable_token_indices fan_in_fan_out layer_replication"
    ),
    "no noise is put on embeddings": "neftune_noise_alpha",
    "images have the size that the processor in the model's folder gives them (preprocessor_config.json)": (
        "max_pixels min_pixels image_max_pixels image_min_pixels image_size image_resize_algorithm"
    ),
    "final/ is the last step; to have step N, delete later checkpoints and run again with --resume -s train.max_steps=N": (
        "load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience early_stopping_steps"
    ),
    "the tracker reads its own environment variables; a run has its folder's name": (
        "run_name project wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_mode trackio_space_id swanlab_project"
    ),
    "upload the folder final/ with hf upload": (
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision"
    ),
    "distributed.zero_stage shares the weights among ranks": "fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap tensor_parallel_size",
    "put several files in data.train and repeat rows there": "mix_strategy interleave_probs interleave_prob",
    "nothing here needs it": (
        "overwrite_cache remove_unused_columns dataloader_pin_memory dataloader_drop_last dataloader_prefetch_factor "
        "dataloader_persistent_workers ddp_timeout ddp_find_unused_parameters ddp_backend use_liger_kernel enable_liger_kernel "
        "use_unsloth use_cache use_cpu tf32 gradient_checkpointing_kwargs save_safetensors save_only_model plot_loss use_hf "
        "special_tokens pad_token local_rank disable_tqdm activation_offloading dataset_prepared_path"
    ),
}
NONE_OF_OURS = {theirs: why for why, names in _NONE_OF_OURS.items() for theirs in names.split()}
