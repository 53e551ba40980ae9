"""How runs get on."""

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
        bars("Progress", "Steps done of the steps to do.", (recorded("progress:ratio"), RUN)),
        number("Time left", "At the pace so far.", (of("eta_seconds"), RUN), unit="s"),
        number(
            "Since the last progress",
            "Any sign of life: a step, a batch of an evaluation, compiling, waiting for storage.",
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
            "By role: a GAN has two. A click on a point leads to the run's samples by step.",
            (of("loss", "role"), f"{RUN} {{{{role}}}}"),
            scale="symlog",
            width=24,
            links=(samples,),
        ),
        curves(
            "Validation",
            "Metrics of the evaluations. A click on a point leads to the run's samples by step.",
            (of("validation", "metric"), f"{RUN} {{{{metric}}}}"),
            scale="symlog",
            links=(samples,),
        ),
        curves(
            "Parts of the loss",
            "Every other value that the loss reports, by name.",
            (of("part", "role", "part"), f"{RUN} {{{{part}}}}"),
            scale="symlog",
        ),
        text(
            "Samples",
            "Pictures and texts that a model made on its way, and its curves by step instead of time: open the "
            "[playground](${gateway}), choose the model, then *Training*. A click on a point of a curve above leads "
            "there for the newest run of that model (`name@live`; a step of any run is `name@<job id>:step-500`). "
            "Programs: `GET /v1/models/{model}/history` and `GET /v1/models/{model}/samples/{step}/{name}`.",
        ),
    ]
    speed = [
        curves("Learning rate", "Of the latest step.", (of("learning_rate"), RUN)),
        curves("Gradient norm", "Before clipping.", (of("gradient_norm", "role"), f"{RUN} {{{{role}}}}"), scale="log"),
        curves("Samples a second", "All workers together.", (of("samples_per_second"), RUN), width=8),
        curves("Tokens a second", "All workers together; of texts alone.", (of("tokens_per_second"), RUN), width=8),
        curves("Time of a step", "Of an optimizer step.", (of("step_seconds"), RUN), unit="s", width=8),
        curves(
            "Waiting for data",
            "Share of the time that steps wait.",
            (of("data_wait_ratio"), RUN),
            unit="percentunit",
            limits=(0, 1),
            alarm=0.2,
            width=8,
        ),
        curves(
            "Use of the device (MFU)",
            "Operations of both passes over what matrix products alone reach.",
            (of("mfu_ratio"), RUN),
            unit="percentunit",
            limits=(0, 1),
            width=8,
        ),
        curves(
            "Operations a second",
            "Of forward and backward passes.",
            (of("flops_per_second"), RUN),
            unit="flops",
            width=8,
        ),
        curves("Workers", "In the group: elastic runs grow and shrink.", (of("workers"), RUN), limits=(0, None)),
        curves("GPU memory", "Most that rank 0 has had; of runs on GPUs.", (of("gpu_memory_bytes"), RUN), unit="bytes"),
    ]
    health = [
        curves(
            "GAN: accuracy of the discriminator",
            "At 1 the generator learns little; 1/2 is the equilibrium, or a collapse.",
            (part("accuracy_(real|fake)"), f"{RUN} {{{{part}}}}"),
            unit="percentunit",
            limits=(0, 1),
            alarm=0.98,
        ),
        curves(
            "GAN: distance to the data",
            "Frechet distance in random features; the floor is of real data against real.",
            (metric("val_frechet.*"), f"{RUN} {{{{metric}}}}"),
            scale="log",
        ),
        curves(
            "VAE: KL divergence",
            "Nats that the latents carry; near 0 they have collapsed.",
            (part("kl"), f"{RUN} training"),
            (metric("val_kl"), f"{RUN} validation"),
        ),
        curves(
            "VAE: active units",
            "Latents whose mean varies over images.",
            (metric("val_active_units"), RUN),
            limits=(0, None),
        ),
    ]
    saving = [
        curves(
            "Steps since the last checkpoint",
            "What a lost worker costs now.",
            (f"{of('step')} - {of('checkpoint_step')}", RUN),
            width=8,
            limits=(0, None),
        ),
        curves(
            "Time of a checkpoint",
            "From a snapshot to its manifest in storage; 95th percentile of all so far.",
            *quantiles("genmodels_checkpoint_seconds", "", (0.95,), by="family", ever=True),
            unit="s",
            width=8,
        ),
        curves(
            "Steps held up",
            "By a save; 95th percentile of all so far.",
            *quantiles("genmodels_checkpoint_stall_seconds", "", (0.95,), by="family", ever=True),
            unit="s",
            width=8,
        ),
        curves(
            "Checkpoints brought to storage",
            "Bytes, all so far.",
            ("sum by (family) (genmodels_checkpoint_bytes_total)", "{{family}}"),
            unit="bytes",
        ),
        curves(
            "Uploads that failed",
            "Of the last 15 minutes; each is tried again.",
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
