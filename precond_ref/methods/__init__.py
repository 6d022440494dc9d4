"""The methods: one module reads like one paper."""
