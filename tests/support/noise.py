"""A callback that writes while a training shows its bar."""

import logging

from transformers import TrainerCallback


class Noise(TrainerCallback):
    """What else writes during a training."""

    def on_step_begin(self, args, state, control, **kwargs):
        import warnings

        logging.getLogger("gkd.noise").warning("a message of step %d", state.global_step)
        warnings.warn(f"a warning of step {state.global_step}", stacklevel=1)
