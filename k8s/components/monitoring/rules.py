"""Write the PrometheusRules from docker/prometheus/rules, where the rules of all platforms are.

python k8s/components/monitoring/rules.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
RULES = HERE.parents[2] / "docker" / "prometheus" / "rules"

HEAD = """\
# Made by rules.py from docker/prometheus/rules/{name}.yml; edit that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: genmodels-{name}
  namespace: genmodels
spec:
"""


def manifest(rules: Path) -> str:
    """Return a file of rules as a PrometheusRule, with its comments."""
    lines = rules.read_text().splitlines()
    return HEAD.format(name=rules.stem) + "".join(f"  {line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    for rules in RULES.glob("*.yml"):
        (HERE / f"prometheusrule.{rules.stem}.yaml").write_text(manifest(rules))
