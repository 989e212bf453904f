"""Differential privacy: noise, clipping, accounting, ledger, statement, audit."""
