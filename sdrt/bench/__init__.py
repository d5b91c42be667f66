"""`sdrt bench`: one bundle on every engine that works here, next to what users would run instead.

Every contestant lives in a process of its own, so that its memory is its own, and they take turns,
so that a machine that drifts favours none; ratios are taken turn by turn. See `worker` for a turn,
`roofline` for what the processor reaches at most, `peers` for what others would run.
"""
