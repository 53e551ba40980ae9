"""What is asked of the models, and how they answer."""

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
        number("Requests", "A second.", (rate("requests_total"), ""), unit="reqps"),
        number("Errors", "Share of 5xx.", (errors, ""), unit="percentunit", steps=((0.01, "orange"), (0.06, "red"))),
        number(
            "First token",
            "95th percentile.",
            *quantiles("genmodels_time_to_first_token_seconds", model, (0.95,)),
            unit="s",
            steps=((1, "red"),),
        ),
        number("Tokens", "Written, a second.", (written, "")),
        number("Pictures", "And latents, a second.", (rate("images_total"), "")),
        number(
            "Waiting",
            "Requests without a slot or a pass.",
            (f"sum(genmodels_waiting_requests{{{model}}})", ""),
            steps=((16, "orange"),),
        ),
    ]
    requests = [
        curves(
            "By status", "Requests a second.", (rate("requests_total", "code"), "{{code}}"), unit="reqps", stacked=True
        ),
        curves(
            "By route", "Requests a second.", (rate("requests_total", "route"), "{{route}}"), unit="reqps", stacked=True
        ),
        curves(
            "Time of a request",
            "To the end of its answer; a text is as long as its client asks.",
            *quantiles("genmodels_request_seconds", model, (0.5, 0.95, 0.99)),
            unit="s",
        ),
        curves(
            "Time by route",
            "95th percentile.",
            *quantiles("genmodels_request_seconds", model, (0.95,), by="route"),
            unit="s",
        ),
        curves(
            "Errors",
            "Share of all models' requests that end in a 5xx, over windows; the budget is 1%.",
            ("genmodels:request_errors:ratio_rate5m", "5 minutes"),
            ("genmodels:request_errors:ratio_rate1h", "1 hour"),
            ("genmodels:request_errors:ratio_rate6h", "6 hours"),
            unit="percentunit",
            alarm=0.01,
            limits=(0, None),
        ),
        curves(
            "Late first tokens",
            "Share of all texts that begin after more than a second, over windows; the budget is 5%.",
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
            "From a request at the host.",
            *quantiles("genmodels_time_to_first_token_seconds", model, (0.5, 0.95, 0.99)),
            unit="s",
            alarm=1,
        ),
        curves(
            "Between two tokens",
            "Of one text.",
            *quantiles("genmodels_time_between_tokens_seconds", model, (0.5, 0.95, 0.99)),
            unit="s",
        ),
        curves(
            "Tokens a second",
            "Read (prompt) and written (completion).",
            (rate("tokens_total", "model", "kind"), "{{model}} {{kind}}"),
            width=8,
        ),
        curves(
            "Slots of the key-value cache",
            "All of them, and those in use.",
            (f"sum by (model, state) (genmodels_kv_slots{{{model}}})", "{{model}} {{state}}"),
            limits=(0, None),
            width=8,
        ),
        curves(
            "Waiting",
            "Texts without a slot, requests for pictures without a pass.",
            (f"sum by (model) (genmodels_waiting_requests{{{model}}})", "{{model}}"),
            limits=(0, None),
            width=8,
        ),
    ]
    pictures = [
        curves(
            "Pictures a second",
            "And latents, by verb.",
            (rate("images_total", "model", "verb"), "{{model}} {{verb}}"),
        ),
        curves(
            "Size of a batch",
            "Mean: texts in a step of decoding, rows in a pass.",
            (f"{rate('batch_size_sum', 'model')} / {rate('batch_size_count', 'model')}", "{{model}}"),
            limits=(0, None),
        ),
    ]
    versions = [
        curves(
            "Active versions",
            "Hosts in which an alias means the version.",
            (f"sum by (model, version) (genmodels_version_active{{{model}}})", "{{model}}@{{version}}"),
            limits=(0, None),
        ),
        curves(
            "Memory of versions",
            "Loaded, over all hosts.",
            (f"sum by (model, version) (genmodels_loaded_bytes{{{model}}})", "{{model}}@{{version}}"),
            unit="bytes",
            stacked=True,
        ),
        curves(
            "Time of a load",
            "To fetch, check and warm a version; median and 95th percentile of all so far.",
            *quantiles("genmodels_version_load_seconds", "", (0.5, 0.95), by="family", ever=True),
            unit="s",
            width=8,
        ),
        curves(
            "Swaps",
            "Versions that took over from an older one; all so far.",
            (f"sum by (model) (genmodels_versions_swapped_total{{{model}}}) {ZERO}", "{{model}}"),
            width=8,
        ),
        curves(
            "Refusals",
            "Versions that were not served, of the last 15 minutes.",
            (f"genmodels:versions_refused:15m{{{model}}} {ZERO}", "{{model}}@{{version}}"),
            alarm=0.5,
            width=8,
        ),
        curves(
            "Evaluations",
            "Figures of what is served, each in the unit of its evaluation: choose one in the legend.",
            (
                f"max by (model, version, metric) (genmodels_version_evaluation_metric{{{model}}})",
                "{{model}}@{{version}} {{metric}}",
            ),
            width=24,
        ),
    ]
    rows = {"Now": now, "Requests": requests, "Texts": texts, "Pictures": pictures, "Versions": versions}
    variables = [choice("model", "Model", "label_values(genmodels_requests_total, model)")]
    return dashboard("serving", "Serving", "What is asked of the models, and how they answer.", variables, rows)
