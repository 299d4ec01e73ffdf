"""Recipes of several stages, one folder each: training, sampling and measuring, each from what others left.

    output_dir: runs/r1-mini
    common: {dataset_name: addition-mixed}      # keys of every stage, as far as it has them
    stages:
      cold-start: {kind: sft, sft_steps: 400}                # from a fresh base, on the dataset's own traces
      grpo: {kind: grpo, model: cold-start, max_steps: 60}   # from another stage's model
      rejection: {kind: sample, model: grpo, prompts: 800, samples: 4, keep: {accuracy: 1, format: 1}}
      more: {kind: augment, data: rejection, ways: [start, goal]}
      sft: {kind: sft, data: more, sft_steps: 400}           # on what another stage kept or made
      student: {kind: distill, teacher: sft, hidden_size: 64, keep: {accuracy: 1}, sft_steps: 400}
      measured: {kind: eval, model: student, eval_samples: 16, ks: [1, 4, 16]}

A stage's folder has ``config.yaml``, by which it runs alone (a GRPO stage by ``grpo-kernels train``, without ``data``),
``metrics.jsonl``, ``samples.jsonl``, its checkpoint or its ``rows.jsonl``, and, once it is done, ``done.json``: it is
not run again then. ``used.json`` tells what it read, and it is refused where that has changed since: a stage that was
made anew, or a local model, dataset or reward function. A GRPO stage that was interrupted goes on from its newest
checkpoint; any other begins again, and ends the same.
"""
