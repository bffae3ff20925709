"""One training, from its data to the saved model."""

import json
from importlib.metadata import version
from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from vlv.files import replaced_together, writing_to
from vlv.provenance import git_commit
from vlv.training.checks import require_a_batch
from vlv.training.overview import overview
from vlv.training.recipe import TrainArguments, changed_arguments
from vlv.training.stage import Settings, Stage
from vlv.training.trainer import StageTrainer, last_whole_checkpoint, seconds_of


def run(stage_type: type[Stage], settings: Settings, args: TrainArguments) -> None:
    """Trains, evaluates and saves."""
    output_dir = Path(args.output_dir)
    set_seed(args.seed)
    stage = stage_type(settings, args)
    stage.check()
    stage.tell(overview(stage, args))  # before the long work
    stage.prepare()
    if not isinstance(stage.train_dataset, IterableDataset):
        require_a_batch(len(stage.train_dataset), settings, args)
    trainer = StageTrainer(stage, args)

    if args.world_size > 1:
        set_seed(args.seed + args.process_index)  # each process draws its own noise
    last = checkpoint_to_resume(stage, args)
    distributed = trainer.accelerator.distributed_type.value  # changed_arguments would lose it
    commit = git_commit()  # now, because the commit may change during the run
    if last and steps_of(last) == args.max_steps:
        stage.tell(f"{last} already has all {args.max_steps} steps. To train longer, give a larger max_steps.")
        trainer.restore(last)
    else:
        trainer.train(resume_from_checkpoint=last and str(last))
    if trainer.state.global_step == 0:
        raise ValueError("No step was trained: the dataset gave no batch.")
    stage.finish()

    metrics = trainer.evaluate()
    with trainer.whole_model():
        if trainer.is_world_process_zero():
            stage.model.eval()
            with replaced_together(output_dir) as folder, writing_to(output_dir):
                stage.save(folder)
    with trainer.all_methods():
        metrics |= stage.evaluate()
    if trainer.is_world_process_zero():
        record = {
            "recipe": {**vars(settings), **changed_arguments(args)},
            "seed": args.seed,
            "commit": commit,
            "versions": {
                name: version(name) for name in ("torch", "transformers", "diffusers", "datasets", "accelerate")
            },
            "device": str(args.device),
            "processes": args.world_size,
            "distributed": distributed,
            "steps": trainer.state.global_step,
            "seconds": round(seconds_of(trainer.state), 1),
            "resumed_from": last.name if last else None,
            "evaluation": metrics,
            "log": trainer.state.log_history,
        }
        (output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(
            f"{settings.stage}: {output_dir}\n"
            + "\n".join(f"  {name}: {value:.4g}" for name, value in metrics.items())
        )
        if left_out := stage.left_out.summary():
            print(left_out)


def checkpoint_to_resume(stage: Stage, args: TrainArguments) -> Path | None:
    """
    The training checkpoint to start from. If --resume finds none, a line says so.

    Raises:
        ValueError: when the checkpoint has more steps than max_steps.
    """
    if not args.resume:
        return None
    last = last_whole_checkpoint(Path(args.output_dir))
    if last is None:
        stage.tell(f"There is no whole training checkpoint in {args.output_dir}: the training starts at step 0.")
        return None
    if 0 < args.max_steps < steps_of(last):
        raise ValueError(f"{last} has more steps than max_steps={args.max_steps}: give a larger max_steps.")
    return last


def steps_of(checkpoint: Path) -> int:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
