from lightning_dfd.plan.advice import Advice, advise
from lightning_dfd.plan.estimate import Estimate, Setup, estimate
from lightning_dfd.plan.meter import Meter
from lightning_dfd.plan.report import as_json, as_text

__all__ = ["Advice", "Estimate", "Meter", "Setup", "advise", "as_json", "as_text", "estimate"]
