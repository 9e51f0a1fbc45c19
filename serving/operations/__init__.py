"""The operations of a model, independent of HTTP and of the process that runs them.

`model_service` answers a call by the `table` of operations, through the `answer_cache`. Each kind
has a file (`oip`, `features`, `embeddings`, `predict`, `reconstruct`, `metadata`) and is an
`operation` value; `request_images`, `fetching` and `response_formats` read and write bodies;
`calls` are requests and answers as values.
"""
