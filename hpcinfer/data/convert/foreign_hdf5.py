"""Converter of HDF5 prompts in any layout that the reader knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, refuse_prompt_options, register
from hpcinfer.data.convert.columns import sampling_names
from hpcinfer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from hpcinfer.data.prompts.reader import PromptsReader


@register
class Hdf5(Converter):
    """A file, or a folder or glob of shards; ids, sampling and meta columns are kept where the layout has them, and what was rejected
    when such a file was made is rejected again.
    """

    name = "hdf5"
    suffixes = (".h5", ".hdf5")
    unit = "row"

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        refuse_prompt_options(options, self.name)
        self._sampling = sampling_names(options.sampling_columns)

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a row."""
        # Here and not above: the text converters start without waiting for h5py's reader modules.
        from hpcinfer.data.prompts import schema
        from hpcinfer.data.prompts.reader import open_prompts

        with open_prompts(source, self.options.dataset or None) as reader:
            for path in reader.paths:
                yield from _earlier_rejects(path)
            for row, id, meta in zip(reader.rows(), reader.ids(), self._meta(reader), strict=True):
                if row.error is not None:
                    yield Reject(row.row, row.error)
                    continue
                try:
                    kept = {name: value for name, value in (row.overrides or {}).items() if name in self._sampling}
                    overrides = schema.checked_overrides(kept) or None
                except ConfigError as error:
                    yield Reject(row.row, schema.one_line(error))
                    continue
                yield Record(row.row, row.text if row.text is not None else row.token_ids, id, overrides, meta)


    def _meta(self, reader: PromptsReader) -> Iterator[dict[str, Any] | None]:
        """The meta values of each row; None where none are to be kept."""
        from hpcinfer.data.export_inputs import meta_names

        names = meta_names(self.options.meta_columns, reader)
        if not names:
            yield from itertools.repeat(None, reader.num_rows)
        for values in zip(*(reader.meta(name) for name in names), strict=True):
            yield {name: value for name, value in zip(names, values, strict=True) if value is not None} or None


def _earlier_rejects(path: str) -> Iterator[Reject]:
    """Those of a prompts file of ours; without a word about each where their file is gone."""
    from hpcinfer.data.prompts.rejects import num_rejected, stated_rejects

    try:
        for reject in list(stated_rejects([path])):
            number = reject.get("line", reject.get("row", 0))
            yield Reject(number, reject["reason"], reject.get("raw", ""), reject.get("id"), reject.get("code", ""))
    except DataError:
        for number in range(num_rejected(path)):
            yield Reject(number, f"it was rejected when {path} was made, whose file of rejects is gone")
