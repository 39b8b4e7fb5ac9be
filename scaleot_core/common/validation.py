"""Check values against a pydantic model, and name what is wrong in one line."""

import operator
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from scaleot_core.common.errors import UserError, one_line


def check_range(name: str, count: int, layers: int, *, least: int, most: int) -> None:
    """Raise UserError if a parameter asks for fewer or more layers than a model of `layers` can give."""
    if not least <= count <= most:
        raise UserError(
            f"the model has {layers} decoder layers; the range is {least} to {most}", parameter=name, value=count
        )


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a truth value for a number: YAML reads `no` as false, which would count as 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("Input should not be true or false")
        return value


class StrictLoader(yaml.SafeLoader):
    """Reads YAML as DVC does: a key that comes twice is refused, since one value would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; YAMLError for a key that comes twice."""
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


B = TypeVar("B", bound=Block)


def _at(data: Any, location: tuple[int | str, ...]) -> Any:
    """Return the value at an error's location."""
    return reduce(operator.getitem, location, data)


def _field(block: Any, location: tuple[int | str, ...]) -> FieldInfo | None:
    """Find the field behind an error's location in a block; None where no field has that name."""
    field = None
    for part in location:
        if isinstance(part, int) and get_origin(block) is list:
            field = FieldInfo.from_annotation(get_args(block)[0])
            continue
        fields = getattr(block, "model_fields", {})
        if part not in fields:
            return field
        field = fields[part]
        block = field.annotation
    return field


@dataclass(frozen=True)
class Bounds:
    """The ends of a number's range; each under pydantic's name for it."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    @classmethod
    def of(cls, field: FieldInfo | None) -> "Bounds":
        """Find a field's; several annotations may each have one."""
        bounds = field.metadata if field else ()
        return cls(**{end.name: getattr(m, end.name) for m in bounds for end in fields(cls) if hasattr(m, end.name)})

    def text(self) -> str:
        """Say the range, such as `the range is above 0, at most 1`; an empty text without one."""
        if self.gt is None:
            if self.ge is None:
                return ""
            return f"the least is {self.ge}" if self.le is None else f"the range is {self.ge} to {self.le}"
        most = f", at most {self.le}" if self.le is not None else f", below {self.lt}" if self.lt is not None else ""
        return f"the range is above {self.gt}{most}"


def validate_block(kind: type[B], data: Any) -> B:
    """Validate values as a block of parameters; UserError names the first key that is wrong, its value and range."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = min(
            errors, key=lambda found: found["type"] != "extra_forbidden"
        )  # a mistyped key explains a missing one
        location = first["loc"]
        if location[-1:] == (0,) and not isinstance(_at(data, location[:-1]), list):
            location = location[:-1]  # a single value may stand for a list of one
        key = ".".join(str(part) for part in location) or "the file"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{key} is no parameter; correct its name or delete it") from None
        if first["type"] == "missing":
            raise UserError(f"{key} is missing; add it (params.yaml in the repository shows how)") from None
        message = one_line(ValueError(first["msg"])).removeprefix("Value error, ")
        between_fields = first["type"] == "value_error"
        bounds = "" if between_fields else Bounds.of(_field(kind, first["loc"])).text()
        value = ... if between_fields and isinstance(first["input"], dict) else first["input"]
        raise UserError(f"{message}; {bounds}" if bounds else message, parameter=key, value=value) from None
