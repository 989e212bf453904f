"""Why a rule is wrong for a pacing and what to take instead: texts that several rules' `because`
share.
"""

from __future__ import annotations

AVERAGE = {
    "buffer": (
        "an average of what happens to be in the buffer moves one client's whole update per arrival"
        " and takes no account of staleness; take strategy=delta_sgd or strategy=fedbuff"
    )
}
MOMENTUM = {
    "buffer": (
        "momentum compounds on every arrival (Nesterov, mu 0.9: 4 equal updates D move 12.1 D where"
        " their mean moves 1.9 D) and diverges; take strategy=delayed_nesterov"
    )
}
ADAPTIVE = {
    "buffer": (
        "its moments decay once per arrival, so they follow single, stale updates instead of their"
        " mean; take strategy=delta_sgd, or strategy=delayed_nesterov for momentum"
    )
}
ROBUST = {
    "buffer": (
        "it compares updates that started from the same model, and a fast client could fill the"
        " buffer alone; take pace=cohort, or strategy=fedbuff without robustness"
    )
}
BUFFERED = {
    "cohort": (
        "it is made for updates that arrive one by one; take pace=buffer, or strategy=delta_sgd,"
        " fedavg or diloco"
    )
}
