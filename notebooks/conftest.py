"""nbval settings: which outputs are pictures or widgets and are therefore run, but not compared."""

import sys

# two seconds of CPU per process for one string format; see qoqlab/viz.py
sys.modules.setdefault("rfc3987_syntax", None)


def pytest_collectstart(collector):
    if collector.path.suffix == ".ipynb":
        collector.skip_compare += (
            "text/html",
            "application/vnd.plotly.v1+json",
            "application/vnd.jupyter.widget-view+json",
        )
