"""Graft networks that the Hugging Face Trainer trains, with checkpoints of each network.

python docs/examples/transformers_callback.py, or with torchrun and without `launch`
"""

from __future__ import annotations

import os

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer
from transformers.trainer_utils import get_last_checkpoint

from dist_graft import launch
from dist_graft.integrations.transformers import GraftCallback, network_arguments

ROOT = os.environ.get("RUN_DIR", "runs/transformers")


def make_model() -> BertForSequenceClassification:
    """A very small text classifier."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, intermediate_size=32, max_position_embeddings=8, **sizes)
    )


def main() -> float:
    arguments = network_arguments(  # before the model: the folder and the seed of this network
        ROOT,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        use_cpu=True,
        save_strategy="epoch",
        report_to=[],
    )
    torch.manual_seed(0)
    texts = [{"input_ids": torch.randint(50, (8,)), "labels": n % 2} for n in range(32)]
    trainer = Trainer(
        make_model(),
        arguments,
        train_dataset=texts,
        callbacks=[GraftCallback(lead="conv+linear")],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
    rounds = [row for row in trainer.state.log_history if "graft/coefficient" in row]
    return rounds[-1]["graft/coefficient"]


if __name__ == "__main__":
    for network, kept in enumerate(launch(main, networks=2)):
        print(f"network {network} kept {kept:.2f} of its weights in the last round")
