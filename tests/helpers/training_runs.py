"""How trainings run in tests, and what is seen of them."""

from transformers import TrainerCallback


#: Small steps that run in this process and show no bar.
QUICK = {"precision": "fp32", "batch_size": 2, "workers": 0, "logging_steps": 1}


class Watch(TrainerCallback):
    """Remembers arguments, optimizer and model; interrupts after some steps."""

    def __init__(self, stop=None):
        self.stop = stop

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.arguments, self.model, self.groups = args, model, optimizer.param_groups

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt
