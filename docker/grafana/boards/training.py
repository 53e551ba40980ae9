"""Build the dashboard of training: the progress of runs."""

from __future__ import annotations

from boards.look import ZERO, Json, bars, choice, curves, dashboard, field, number, quantiles, text

RUN = "{{job}} {{model}}"


def training() -> Json:
    def of(name: str, *by: str, where: str = "") -> str:
        labels = ", ".join(("job", "model", *by))
        return f'max by ({labels}) (genmodels_training_{name}{{job=~"$job", model=~"$model"{where}}})'

    def recorded(name: str) -> str:
        return f'genmodels:training_{name}{{job=~"$job", model=~"$model"}}'

    def part(pattern: str) -> str:
        return of("part", "role", "part", where=f', part=~"{pattern}"')

    def metric(pattern: str) -> str:
        return of("validation", "metric", where=f', metric=~"{pattern}"')

    samples = {
        "title": "Samples by step in the playground",
        "url": "${gateway}/#${__field.labels.model}@live/training",
        "targetBlank": True,
    }
    now = [
        bars("Progress", "Share of the steps that are done.", (recorded("progress:ratio"), RUN)),
        number("Remaining time", "Estimate from the speed so far.", (of("eta_seconds"), RUN), unit="s"),
        number(
            "Time since the last progress",
            "Any progress counts: a step, a batch of an evaluation, compiling, waiting for storage.",
            (recorded("silence:seconds"), RUN),
            unit="s",
            steps=((60, "orange"), (180, "red")),
        ),
        number(
            "Not finite",
            "Runs with a loss, a metric or a gradient norm that is NaN or infinite.",
            (f"sum({recorded('not_finite:bool')}) {ZERO}", ""),
            steps=((1, "red"),),
        ),
    ]
    losses = [
        curves(
            "Loss",
            "Loss of each role; a GAN has two roles. A click on a point opens the run's samples by step.",
            (of("loss", "role"), f"{RUN} {{{{role}}}}"),
            scale="symlog",
            width=24,
            links=(samples,),
        ),
        curves(
            "Validation",
            "Metrics of the evaluations. A click on a point opens the run's samples by step.",
            (of("validation", "metric"), f"{RUN} {{{{metric}}}}"),
            scale="symlog",
            links=(samples,),
        ),
        curves(
            "Components of the loss",
            "All other values that the loss reports, by name.",
            (of("part", "role", "part"), f"{RUN} {{{{part}}}}"),
            scale="symlog",
        ),
        text(
            "Samples",
            "Images and texts that a model made during training, and its curves by step instead of time: open the "
            "[playground](${gateway}), choose the model, then *Training*. A click on a point of a curve above leads "
            "there for the newest run of that model (`name@live`; a step of any run is `name@<job id>:step-500`). "
            "Programs: `GET /v1/models/{model}/history` and `GET /v1/models/{model}/samples/{step}/{name}`.",
        ),
    ]
    speed = [
        curves("Learning rate", "Learning rate of the latest step.", (of("learning_rate"), RUN)),
        curves(
            "Gradient norm", "Norm before clipping.", (of("gradient_norm", "role"), f"{RUN} {{{{role}}}}"), scale="log"
        ),
        curves("Samples per second", "All workers together.", (of("samples_per_second"), RUN), width=8),
        curves("Tokens per second", "All workers together; only for texts.", (of("tokens_per_second"), RUN), width=8),
        curves("Step time", "Duration of an optimizer step.", (of("step_seconds"), RUN), unit="s", width=8),
        curves(
            "Waiting for data",
            "Share of the training time spent waiting for data.",
            (of("data_wait_ratio"), RUN),
            unit="percentunit",
            limits=(0, 1),
            alarm=0.2,
            width=8,
        ),
        curves(
            "Utilization of the device (MFU)",
            "Operations of forward and backward passes, divided by the device's speed in matrix products alone.",
            (of("mfu_ratio"), RUN),
            unit="percentunit",
            limits=(0, 1),
            width=8,
        ),
        curves(
            "Operations per second",
            "Operations of forward and backward passes.",
            (of("flops_per_second"), RUN),
            unit="flops",
            width=8,
        ),
        curves(
            "Workers", "Workers in the group; elastic runs grow and shrink.", (of("workers"), RUN), limits=(0, None)
        ),
        curves(
            "GPU memory", "Peak memory of rank 0; only for runs on GPUs.", (of("gpu_memory_bytes"), RUN), unit="bytes"
        ),
    ]
    health = [
        curves(
            "GAN: accuracy of the discriminator",
            "At 1 the generator learns little; 1/2 means equilibrium, or a collapse.",
            (part("accuracy_(real|fake)"), f"{RUN} {{{{part}}}}"),
            unit="percentunit",
            limits=(0, 1),
            alarm=0.98,
        ),
        curves(
            "GAN: distance to the data",
            "Frechet distance in random features; the floor is the distance between real data and real data.",
            (metric("val_frechet.*"), f"{RUN} {{{{metric}}}}"),
            scale="log",
        ),
        curves(
            "VAE: KL divergence",
            "Information in the latents, in nats; near 0 the latents have collapsed.",
            (part("kl"), f"{RUN} training"),
            (metric("val_kl"), f"{RUN} validation"),
        ),
        curves(
            "VAE: active units",
            "Number of latents whose mean varies between images.",
            (metric("val_active_units"), RUN),
            limits=(0, None),
        ),
    ]
    saving = [
        curves(
            "Steps since the last checkpoint",
            "Steps that the loss of a worker would cost now.",
            (f"{of('step')} - {of('checkpoint_step')}", RUN),
            width=8,
            limits=(0, None),
        ),
        curves(
            "Duration of a checkpoint",
            "Time from a snapshot to its manifest in storage; 95th percentile of all so far.",
            *quantiles("genmodels_checkpoint_seconds", "", (0.95,), by="family", ever=True),
            unit="s",
            width=8,
        ),
        curves(
            "Training stalled by a save",
            "Time that a save stops the steps; 95th percentile of all so far.",
            *quantiles("genmodels_checkpoint_stall_seconds", "", (0.95,), by="family", ever=True),
            unit="s",
            width=8,
        ),
        curves(
            "Checkpoint bytes uploaded",
            "Total bytes of uploaded checkpoints.",
            ("sum by (family) (genmodels_checkpoint_bytes_total)", "{{family}}"),
            unit="bytes",
        ),
        curves(
            "Uploads that failed",
            "Failed uploads in the last 15 minutes; each is retried.",
            (f"genmodels:checkpoint_failures:15m {ZERO}", "{{family}}"),
            alarm=3,
        ),
    ]
    variables = [
        choice("job", "Job", "label_values(genmodels_training_step, job)"),
        choice("model", "Model", 'label_values(genmodels_training_step{job=~"$job"}, model)'),
        field("gateway", "Endpoint", "http://127.0.0.1:8000"),
    ]
    rows = {"Now": now, "Loss": losses, "Optimizer and speed": speed, "Health": health, "Checkpoints": saving}
    description = "Runs as they train; choose several to see their curves side by side. A run's series end with it."
    return dashboard("training", "Training", description, variables, rows)
