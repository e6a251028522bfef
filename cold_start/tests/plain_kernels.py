"""Flash attention in plain torch, which tests use on CPUs instead of kernels that only run on GPUs."""

import torch


class PlainKernels:
    """The functions of flash kernels, sequence by sequence, with every matrix written out."""

    @staticmethod
    def pieces(query, key, value, bounds, is_causal, scaling):
        """Of each sequence: (queries, keys, query, key, value, scores), [heads, length, ...], keys repeated."""
        groups = query.shape[1] // key.shape[1]
        for (q0, q1), (k0, k1) in zip(*(b.unfold(0, 2, 1).tolist() for b in bounds), strict=True):
            q = query[q0:q1].transpose(0, 1).float()
            k, v = (tensor[k0:k1].float().repeat_interleave(groups, dim=1).transpose(0, 1) for tensor in (key, value))
            scores = q @ k.transpose(1, 2) * scaling
            if is_causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
            yield slice(q0, q1), slice(k0, k1), q, k, v, scores

    @classmethod
    def forward(cls, query, key, value, bounds, longest, *, is_causal, scaling):
        output, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
        for queries, _, _, _, v, scores in cls.pieces(query, key, value, bounds, is_causal, scaling):
            output[queries] = (scores.softmax(-1) @ v).transpose(0, 1)
            lse[:, queries] = scores.logsumexp(-1)
        return output, lse

    @classmethod
    def backward(cls, gradient, query, key, value, output, lse, bounds, longest, *, is_causal, scaling):
        totals = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        for queries, keys, q, k, v, scores in cls.pieces(query, key, value, bounds, is_causal, scaling):
            to_output = gradient[queries].transpose(0, 1).float()
            probabilities = (scores - lse[:, queries].unsqueeze(-1)).exp()
            delta = (gradient[queries].float() * output[queries]).sum(-1).t().unsqueeze(-1)
            to_scores = probabilities * (to_output @ v.transpose(1, 2) - delta) * scaling
            shares = (to_scores @ k, to_scores.transpose(1, 2) @ q, probabilities.transpose(1, 2) @ to_output)
            for total, tokens, share in zip(totals, (queries, keys, keys), shares, strict=True):
                total[tokens] += share.transpose(0, 1).unflatten(1, (total.shape[1], -1)).sum(2)
        return totals
