"""Lightning without its greetings, so that what a run prints is what the run has to say."""

from __future__ import annotations

import logging
import warnings


def quiet_lightning() -> None:
    """Silence Lightning's notes on hardware and products, and a deprecation inside Lightning that users cannot mend."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
