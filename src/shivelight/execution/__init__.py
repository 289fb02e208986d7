"""How a block runs under a decision: time, hooks, tokens, schedules, folded weights. Names no model family."""
