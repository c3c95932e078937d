"""The layer-wise mode inside the Trainer of transformers, as any other optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nibble.optim import GaLoreAdamW, layerwise_

torch.set_num_threads(1)


def test_inside_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    tokens = torch.arange(24).repeat(32, 1) + torch.arange(32).unsqueeze(1)
    rows = [{"input_ids": row % 64, "labels": row % 64} for row in tokens]

    def run(name: str, *, batch: int, accumulation: int) -> tuple[Any, list[dict[str, float]]]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        linear = [p for n, p in model.named_parameters() if "proj" in n]
        ids = {id(p) for p in linear}
        rest = [p for p in model.parameters() if id(p) not in ids]
        galore = {"rank": 8, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
        groups = [{"params": rest}, {"params": linear, **galore, "basis": "randomised"}]
        optimizer = GaLoreAdamW(groups, lr=5e-3)
        layerwise_(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 4))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=12,
            max_grad_norm=1.0,
            logging_steps=1,
            save_steps=6,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        return trainer, [line for line in trainer.state.log_history if "loss" in line]

    trainer, log = run("whole", batch=8, accumulation=1)
    _, parts = run("parts", batch=2, accumulation=4)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(line["grad_norm"] > 0 for line in log)
    for one, other in zip(log, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    saved = torch.load(tmp_path / "whole" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert any("basis_right" in state for state in saved["state"].values())
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(5e-3)
