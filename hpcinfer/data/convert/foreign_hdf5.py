"""Converter of HDF5 prompts in any layout that the reader knows."""

from __future__ import annotations

from collections.abc import Iterator

from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, refuse_prompt_options, register
from hpcinfer.errors import ConfigError


@register
class Hdf5(Converter):
    """A file, or a folder or glob of shards; ids and sampling columns are kept where the layout has them."""

    name = "hdf5"
    suffixes = (".h5", ".hdf5")
    unit = "row"

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        refuse_prompt_options(options, self.name)

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a row."""
        # Here and not above: the text converters start without waiting for h5py's reader modules.
        from hpcinfer.data.prompts import schema
        from hpcinfer.data.prompts.reader import open_prompts

        with open_prompts(source, self.options.dataset or None) as reader:
            for row, id in zip(reader.rows(), reader.ids(), strict=True):
                if row.error is not None:
                    yield Reject(row.row, row.error)
                    continue
                try:
                    overrides = schema.checked_overrides(dict(row.overrides)) if row.overrides else None
                except ConfigError as error:
                    yield Reject(row.row, schema.one_line(error))
                    continue
                yield Record(row.row, row.text if row.text is not None else row.token_ids, id, overrides)
