"""BERT's attention with experts for its keys and values. Q sequences, T positions, D width."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention, eager_attention_forward


class RoutedSelfAttention(BertSelfAttention):
    """BERT's attention, with something added to keys and values."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_values: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attended states (Q, T, D); ``key_values`` (Q, T, 2 D) holds what is added, keys first."""
        if key_values is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        for_keys, for_values = key_values.chunk(2, dim=-1)
        query = self.query(hidden_states).view(heads).transpose(1, 2)
        key = (self.key(hidden_states) + for_keys).view(heads).transpose(1, 2)
        value = (self.value(hidden_states) + for_values).view(heads).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        found, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return found.reshape(hidden_states.shape).contiguous(), weights
