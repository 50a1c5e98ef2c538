"""The maths that engine and learner share: noise, soft embeddings and log-probabilities.

What flows in: logits, hidden states and the two weight matrices (LM head W [V, d], embedding E [V, n0]).
What flows out: on the engine's side the next input of a thinking model, on the learner's side how likely that input was.

```
 engine    logits [R, V] --select_support--> SupportBatch (ids, probs: the record)
                                                  | mix: sum of p_v E_v
           seeds, positions --normal_rows--> noise v
                                    '-- x sigma --> + --round--> soft embedding h~ [R, n0] --> next forward
                                                    ^
 learner   record + seeds --rebuild: the same bits--'             (noise never travels, only its seed)

           hidden [T, d], W, E, h~, support --soft_logprob--> log pi(h~) [T], mean [T, n0]     CoT steps
           hidden [T, d], W, targets -------token_logprob---> log p(token) [T], entropy [T]    answer tokens
```

| file | what it holds |
|---|---|
| noise.py | counter-based normals and uniforms, spec "sn1": the same bits on every device |
| soft_embedding.py | the support of a step, its mixture, and the soft embedding made or rebuilt from it |
| soft_logprob.py | Gaussian log-probability of a soft embedding: on the recorded support, and over all of V |
| token_logprob.py | log-probability of an ordinary token, and the entropy of its distribution |
| segments.py | sums and gathers over ragged rows (CSR), used by the above |
| softmax.py, matmul.py | what happens to a chunk of logits, and products that are added up in float32 |
| checks.py | input checks: errors that name the argument, its shape and what was expected |
| triton_noise.py | the noise on a GPU, bit for bit the CPU's |
| triton_select.py | the support on a GPU, at fixed addresses and without a wait, as a CUDA graph needs it |
| triton_soft_embedding.py | the mixture and its noise on a GPU, from such a support or from a record: the same bits |
| triton_segments.py, triton_softmax.py | segments.py and softmax.py on a GPU |

On a CPU everything is plain torch and Triton is never imported. On a CUDA tensor the same functions launch Triton kernels; the
torch form beside each is its reference, and Triton's interpreter checks the one against the other where there is no GPU.

Everything computes in float32 (float64 when given float64) whatever the dtype of the weights, and never holds a [T, V] tensor
beyond one chunk. Logits rounded to bf16 move a soft embedding's mean by 0.4 sigma on average, so none are trusted here.
"""
