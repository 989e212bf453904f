"""Messages that state why a rule is refused under a pacing, and what to choose instead.

Each constant is the `Strategy.refused_pacings` of a family of rules.
"""

from __future__ import annotations

AVERAGE_NEEDS_COHORT = {
    "buffer": (
        "an average of the updates in the buffer moves the model by the full update of a single"
        " client at every arrival and ignores staleness; take strategy=delta_sgd or"
        " strategy=fedbuff"
    )
}
MOMENTUM_NEEDS_COHORT = {
    "buffer": (
        "momentum compounds on every arrival (Nesterov, mu 0.9: 4 equal updates D move 12.1 D where"
        " their mean moves 1.9 D) and diverges; take strategy=delayed_nesterov"
    )
}
MOMENTS_NEED_COHORT = {
    "buffer": (
        "its moments decay once per arrival, so they follow single, stale updates instead of their"
        " mean; take strategy=delta_sgd, or strategy=delayed_nesterov for momentum"
    )
}
COMPARISON_NEEDS_COHORT = {
    "buffer": (
        "it compares updates that started from the same model, and a fast client could fill the"
        " buffer alone; take pace=cohort, or strategy=fedbuff without robustness"
    )
}
ARRIVALS_NEED_BUFFER = {
    "cohort": (
        "it is made for updates that arrive one by one; take pace=buffer, or strategy=delta_sgd,"
        " fedavg or diloco"
    )
}
