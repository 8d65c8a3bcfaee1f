"""Evaluating a run at a step, and moving best.pt."""

from __future__ import annotations

from detbb.core.errors import unknown_name
from detbb.detector import view
from detbb.distributed.collectives import all_gather_objects, raise_on_all_ranks, rank
from detbb.inference.evaluate import evaluate_detector
from detbb.training.state import Run, save_checkpoint


def evaluate_run(run: Run) -> None:
    """Evaluate every branch that has a val split, move best.pt, and log it."""
    heads, ema = run.evaluated_heads(), run.state.ema
    for weights in run.missing_evaluations():
        seen = view(run.state.detector, ema.tensors if weights == "ema" and ema is not None else {})
        second = weights != run.evaluated_weights()[0]
        output = run.folder / "eval" / f"step_{run.step:07d}{'_model' if second else ''}"
        metrics = evaluate_detector(
            seen, heads, config=run.config, output_dir=output, weights=weights, step=run.step, stop=run.stop
        )
        if signal := max(all_gather_objects(run.stop())):  # --resume evaluates this step again
            save_checkpoint(run)
            raise run.stopped(signal)
        if not second:
            run.metrics = metrics
            follow_best(run)
        pictures = {n: output / n / "samples.png" for n in heads if (output / n / "samples.png").exists()}
        run.log.evaluation(run.step, weights, metrics, images=pictures)
        run.evaluated.add((run.step, weights))


def follow_best(run: Run) -> None:
    """Move best.pt if the metrics are the best so far. Raises: UserError: `eval.best` is none of them."""
    name = run.best_metric()
    improved = run.metrics.get(name, float("-inf")) > run.best
    unknown = run.config.eval.best is not None and name not in run.metrics
    if improved or unknown:
        save_checkpoint(run)
    with raise_on_all_ranks():
        if unknown:
            raise unknown_name("eval.best", name, run.metrics)
        if improved:
            run.best = run.metrics[name]
            if rank() == 0:
                run.checkpoints.mark_best(run.step)
