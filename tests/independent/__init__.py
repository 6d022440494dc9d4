"""The methods once more, from the papers' mathematics in 50-digit arithmetic; shares no code with precond_ref.

Writes the conformance vectors: `precond-ref vectors build`.
"""
