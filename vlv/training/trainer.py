"""The Trainer of `vlv train`, and its training checkpoints."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from vlv.files import writing_to
from vlv.plain import Collate
from vlv.training.checks import groups_by_length, require_finite
from vlv.training.samples import LossBar, write_samples
from vlv.training.sharding import (
    assign,
    blank_copy,
    fill,
    gathered,
    keep_digits,
    keep_tied_together,
    reshard,
    unsharded,
)
from vlv.training.stage import Stage


class StageTrainer(Trainer):
    """
    The stock Trainer with two changes. Its checkpoints hold only what trains, because frozen weights are in their
    source. Its log also has the parts of the loss: the outputs of the model whose names end in `_loss`.
    """

    def __init__(self, stage: Stage, args: TrainingArguments):
        self.stage = stage
        super().__init__(
            model=stage.model,
            args=args,
            train_dataset=stage.train_dataset,
            eval_dataset=stage.eval_dataset,
            data_collator=Collate(stage.collate),
            compute_loss_func=stage.loss_function(),
            callbacks=[EpochCallback(stage.train_dataset), Clock(), *stage.callbacks()],
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar)
        self.blank = None  # FSDP shards the model in place, so the final weights are gathered into this copy
        if self.is_fsdp_enabled:
            if getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:  # older releases lack the field
                raise ValueError("Only the second version of FSDP is supported: set fsdp_version: 2.")
            self.blank = blank_copy(stage.model)
            keep_tied_together(stage.model)
            keep_digits(self.accelerator.state.fsdp_plugin)
        self.loss_parts: Counter[str] = Counter()  # summed since the last log

    def train(self, *args, **kwargs) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LossBar):
                    callback.close()

    def create_optimizer(self, *args) -> torch.optim.Optimizer:
        optimizer, rates = super().create_optimizer(*args), self.stage.learning_rates()
        for group in list(optimizer.param_groups):
            own = [weight for weight in group["params"] if weight in rates]
            if own and group["lr"] != rates[own[0]]:
                group["params"] = [weight for weight in group["params"] if weight not in rates]
                optimizer.add_param_group({**group, "params": own, "lr": rates[own[0]]})
        self.optimizer = self.stage.optimizer(optimizer)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name, part in outputs.items():
                if name.endswith("_loss"):
                    self.loss_parts[name] += part.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        require_finite(logs, self.state.global_step)
        if "loss" in logs and self.loss_parts:
            # In proportion to the loss, because Trainer's own sum includes accumulated and gathered batches.
            whole = sum(self.loss_parts.values())
            logs |= {name: logs["loss"] * (part / whole).item() for name, part in self.loss_parts.items()}
            self.loss_parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        with self.all_methods():
            samples = self.stage.samples()
        if samples is not None and self.is_world_process_zero():
            folder = Path(self.args.output_dir) / "samples"
            write_samples(samples, folder, self.state.global_step, self.callback_handler.callbacks)
        return metrics

    @contextmanager
    def all_methods(self) -> Iterator[None]:
        """
        Lets the stage call other methods of its model than `forward`. Each process may hold a part of the model, so
        all processes must make the same calls.
        """
        with unsharded(self.stage.model), self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():
            yield

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Gathers the stage's whole model, for the first process to save. All processes must enter this together."""
        trained = self.stage.model
        if self.blank is not None:
            fill(self.blank, trained, keep=self.is_world_process_zero())
            self.stage.model = self.blank
        try:
            yield
        finally:
            self.stage.model = trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:  # Trainer would gather the frozen weights too
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        reshard(self.stage.model)
        state = {}
        for name, tensor in self.stage.state().items():
            # With FSDP, all processes gather the weights here. DeepSpeed passes weights that it has gathered itself.
            whole = gathered((state_dict or {}).get(name, tensor))
            if self.args.should_save:
                state[name] = whole.cpu().contiguous()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / SAFE_WEIGHTS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # As in Trainer, but without a second copy of the whole model.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state is written next and marks the checkpoint as complete. All processes must have written their parts.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        reshard(self.stage.model)
        saved, state = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME), self.stage.state()
        if {name: tensor.shape for name, tensor in saved.items()} != {
            name: tensor.shape for name, tensor in state.items()
        }:
            raise ValueError(
                f"{resume_from_checkpoint} is a checkpoint of another model, or of other trained parts, than this"
                " recipe's: choose another output_dir, or leave out --resume."
            )
        for name, tensor in saved.items():
            assign(state[name], tensor)

    def _load_best_model(self) -> None:
        # By its name, because the output folder may have been moved since the checkpoint was saved.
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
        self._load_from_checkpoint(str(best))

    def restore(self, checkpoint: Path) -> None:
        """Loads a checkpoint that has all steps, or the best one. Trainer itself would train one more step."""
        if self.is_fsdp_enabled:
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        settings = set(self.optimizer.param_groups[0])
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            if missing := settings - set(self.optimizer.param_groups[0]):
                raise KeyError(*missing)
        except FileNotFoundError as error:
            raise ValueError(
                f"{checkpoint} holds no {Path(error.filename).name}: FSDP, DeepSpeed and DDP keep the optimizer in"
                " different files, so resume with the config of accelerate that the run was started with."
            ) from error
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{checkpoint} was saved with another optimizer than {self.args.optim.value}, or for other groups of"
                " parts: resume with the settings of that run, or choose another output_dir."
            ) from error

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Only the loss, which the model of every stage returns, whatever the names of its inputs."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach().mean(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counting them would go through all parameters in every step

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # A stream divides itself among the processes. If accelerate divided it, one process would read for all.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not groups_by_length(self.args):
            return super()._get_train_sampler(train_dataset)
        # As in Trainer, but with the same result on all processes, and in a resumed run as in an uninterrupted run.
        sampler = DistributedLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            num_replicas=1,
            rank=0,
            seed=self.args.seed,
            lengths=self.stage.lengths(),
        )
        self.add_callback(EpochCallback(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return SequentialSampler(eval_dataset)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.require_finite_weights()
        with writing_to(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def require_finite_weights(self) -> None:
        """Raises ValueError, on every process, before a broken model replaces a good checkpoint."""
        weights = [weight.detach() for weight in self.stage.state().values()]
        weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        broken = sum((~weight.isfinite()).sum() for weight in weights)
        if self.accelerator.reduce(torch.as_tensor(broken, device=self.args.device)).item():
            raise ValueError(
                f"Weights are not finite at step {self.state.global_step}, so the training stops: lower learning_rate."
                " Training checkpoints of earlier steps are kept for --resume."
            )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        # Trainer has one switch for training and evaluation, but only training drops its short last batch.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last


class EpochCallback(TrainerCallback):
    """
    Tells the dataset, or a sampler, which epoch begins, on every process. accelerate does not do this when it shards
    the batches.
    """

    def __init__(self, listener: Dataset | Sampler):
        self.listener = listener

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.listener, "set_epoch"):
            self.listener.set_epoch(int(state.epoch))


class Clock(TrainerCallback):
    """
    Keeps the seconds of training up to the last step in the Trainer's state, which each training checkpoint holds, so
    that a resumed run adds its own.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.time() - seconds_of(state)

    def on_step_end(self, args, state, control, **kwargs):
        # In the form of transformers' own callbacks. Theirs cannot resume a checkpoint that lacks their entry.
        state.stateful_callbacks["Clock"] = {"attributes": {"seconds": time.time() - self.started}}


def seconds_of(state: TrainerState) -> float:
    """The seconds of training up to the last step, those of earlier runs included."""
    return state.stateful_callbacks.get("Clock", {"attributes": {"seconds": 0.0}})["attributes"]["seconds"]


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete training checkpoint. A run that was killed while saving leaves an incomplete one."""
    found = {
        int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))
    }
    for step in sorted(found, reverse=True):
        try:
            TrainerState.load_from_json(str(found[step] / TRAINER_STATE_NAME))  # Trainer writes it last
            with safe_open(found[step] / SAFE_WEIGHTS_NAME, framework="pt"):
                return found[step]
        except (OSError, JSONDecodeError, TypeError, SafetensorError):
            continue
    return None
