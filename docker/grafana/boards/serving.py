"""Build the dashboard of serving: requests to the models and their responses."""

from __future__ import annotations

from boards.look import RATE, ZERO, Json, choice, curves, dashboard, number, quantiles


def serving() -> Json:
    model = 'model=~"$model"'

    def rate(name: str, *by: str, where: str = "") -> str:
        return f"sum by ({', '.join(by)}) (rate(genmodels_{name}{{{model}{where}}}[{RATE}]))"

    failed = rate("requests_total", where=', code=~"5.."')
    errors = f"({failed} or vector(0)) / {rate('requests_total')}"
    written = rate("tokens_total", where=', kind="completion"')
    now = [
        number("Requests", "Requests per second.", (rate("requests_total"), ""), unit="reqps"),
        number(
            "Errors",
            "Share of responses with a 5xx status.",
            (errors, ""),
            unit="percentunit",
            steps=((0.01, "orange"), (0.06, "red")),
        ),
        number(
            "First token",
            "Time to the first token of a text, 95th percentile.",
            *quantiles("genmodels_time_to_first_token_seconds", model, (0.95,)),
            unit="s",
            steps=((1, "red"),),
        ),
        number("Tokens", "Generated tokens per second.", (written, "")),
        number("Images", "Images and latents per second.", (rate("images_total"), "")),
        number(
            "Waiting",
            "Requests that wait for a slot or a batch.",
            (f"sum(genmodels_waiting_requests{{{model}}})", ""),
            steps=((16, "orange"),),
        ),
    ]
    requests = [
        curves(
            "By status",
            "Requests per second.",
            (rate("requests_total", "code"), "{{code}}"),
            unit="reqps",
            stacked=True,
        ),
        curves(
            "By route",
            "Requests per second.",
            (rate("requests_total", "route"), "{{route}}"),
            unit="reqps",
            stacked=True,
        ),
        curves(
            "Duration of a request",
            "Time to the end of the response; the client sets the length of a text.",
            *quantiles("genmodels_request_seconds", model, (0.5, 0.95, 0.99)),
            unit="s",
        ),
        curves(
            "Duration by route",
            "Duration of a request by route, 95th percentile.",
            *quantiles("genmodels_request_seconds", model, (0.95,), by="route"),
            unit="s",
        ),
        curves(
            "Errors",
            "Share of all models' requests that end in a 5xx, in windows of three lengths; the budget is 1%.",
            ("genmodels:request_errors:ratio_rate5m", "5 minutes"),
            ("genmodels:request_errors:ratio_rate1h", "1 hour"),
            ("genmodels:request_errors:ratio_rate6h", "6 hours"),
            unit="percentunit",
            alarm=0.01,
            limits=(0, None),
        ),
        curves(
            "Slow first tokens",
            "Share of all texts whose first token takes more than 1 s, in windows of three lengths; the budget is 5%.",
            ("genmodels:slow_first_tokens:ratio_rate5m", "5 minutes"),
            ("genmodels:slow_first_tokens:ratio_rate1h", "1 hour"),
            ("genmodels:slow_first_tokens:ratio_rate6h", "6 hours"),
            unit="percentunit",
            alarm=0.05,
            limits=(0, None),
        ),
    ]
    texts = [
        curves(
            "Time to the first token",
            "Time from the request's arrival at the model host to the first token.",
            *quantiles("genmodels_time_to_first_token_seconds", model, (0.5, 0.95, 0.99)),
            unit="s",
            alarm=1,
        ),
        curves(
            "Time between tokens",
            "Time between two tokens of one text.",
            *quantiles("genmodels_time_between_tokens_seconds", model, (0.5, 0.95, 0.99)),
            unit="s",
        ),
        curves(
            "Tokens per second",
            "Tokens read (prompt) and generated (completion).",
            (rate("tokens_total", "model", "kind"), "{{model}} {{kind}}"),
            width=8,
        ),
        curves(
            "Slots of the key-value cache",
            "Slots, by state.",
            (f"sum by (model, state) (genmodels_kv_slots{{{model}}})", "{{model}} {{state}}"),
            limits=(0, None),
            width=8,
        ),
        curves(
            "Waiting",
            "Texts that wait for a slot, and image requests that wait for a batch.",
            (f"sum by (model) (genmodels_waiting_requests{{{model}}})", "{{model}}"),
            limits=(0, None),
            width=8,
        ),
    ]
    images = [
        curves(
            "Images per second",
            "Images and latents per second, by verb.",
            (rate("images_total", "model", "verb"), "{{model}} {{verb}}"),
        ),
        curves(
            "Batch size",
            "Mean: texts in a decoding step, rows in a batch of images.",
            (f"{rate('batch_size_sum', 'model')} / {rate('batch_size_count', 'model')}", "{{model}}"),
            limits=(0, None),
        ),
    ]
    versions = [
        curves(
            "Active versions",
            "Number of model hosts that have the version in memory for an alias.",
            (f"sum by (model, version) (genmodels_version_active{{{model}}})", "{{model}}@{{version}}"),
            limits=(0, None),
        ),
        curves(
            "Memory of versions",
            "Memory of loaded versions, sum of all model hosts.",
            (f"sum by (model, version) (genmodels_loaded_bytes{{{model}}})", "{{model}}@{{version}}"),
            unit="bytes",
            stacked=True,
        ),
        curves(
            "Duration of a load",
            "Time to fetch, check and warm up a version; median and 95th percentile of all so far.",
            *quantiles("genmodels_version_load_seconds", "", (0.5, 0.95), by="family", ever=True),
            unit="s",
            width=8,
        ),
        curves(
            "Swaps",
            "Total of versions that replaced an older one.",
            (f"sum by (model) (genmodels_versions_swapped_total{{{model}}}) {ZERO}", "{{model}}"),
            width=8,
        ),
        curves(
            "Refusals",
            "Versions that were refused in the last 15 minutes.",
            (f"genmodels:versions_refused:15m{{{model}}} {ZERO}", "{{model}}@{{version}}"),
            alarm=0.5,
            width=8,
        ),
        curves(
            "Evaluations",
            "Evaluation metrics of the served versions, each in its own unit: choose one in the legend.",
            (
                f"max by (model, version, metric) (genmodels_version_evaluation_metric{{{model}}})",
                "{{model}}@{{version}} {{metric}}",
            ),
            width=24,
        ),
    ]
    pools = [
        curves(
            "Waiting for a pool",
            "Requests that wait for the first host of a pool that was scaled to zero.",
            ("sum by (pool) (genmodels_pool_waiting_requests)", "{{pool}}"),
            limits=(0, None),
        ),
        curves(
            "Wait for a pool",
            "Time that requests have waited for the first host of a pool; median and 95th percentile of all so far.",
            *quantiles("genmodels_pool_wait_seconds", "", (0.5, 0.95), by="pool", ever=True),
            unit="s",
        ),
    ]
    rows = {
        "Now": now,
        "Requests": requests,
        "Texts": texts,
        "Images": images,
        "Versions": versions,
        "Pools": pools,
    }
    variables = [choice("model", "Model", "label_values(genmodels_requests_total, model)")]
    return dashboard("serving", "Serving", "Requests to the models and their responses.", variables, rows)
