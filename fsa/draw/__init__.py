"""Pictures for people: colours, lettering and figures."""
