"""An example of a plug-in: models in a DynamoDB table, `dynamodb://table/model?region=eu-west-1`.

The table has one key, "key" (text). Items hold 400 KB, names and key included, so chunks are
smaller than in other stores. A package would declare it as

    [project.entry-points."rdmaload.connectors"]
    dynamodb = "its_module:DynamoDbConnector"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from rdmaload.connectors import KeyValueConnector
from rdmaload.errors import AuthenticationError, NotFoundError, UnavailableError
from rdmaload.options import Options
from rdmaload.urls import Url

if TYPE_CHECKING:
    from typing_extensions import Buffer

_KEY = {"ExpressionAttributeNames": {"#k": "key"}}  # "key" is a reserved word there
_ABSENT = {"ConditionExpression": "attribute_not_exists(#k)", **_KEY}
_PRESENT = {"ConditionExpression": "attribute_exists(#k)", **_KEY}


class DynamoDbConnector(KeyValueConnector):
    url_options = frozenset({"region"})
    max_value_bytes = 400_000  # 400 KiB per item, less its key (2048 bytes at most) and names

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        self._table = url.host or ""
        region = url.query.get("region", "us-east-1")
        self._client: Any = boto3.client("dynamodb", region_name=region)

    def close(self) -> None:
        super().close()
        self._client.close()

    def get(self, key: str) -> bytes | None:
        answer = self._call(self._client.get_item, key, Key={"key": {"S": key}}, ConsistentRead=True)
        return bytes(answer["Item"]["value"]["B"]) if "Item" in answer else None

    def set(self, key: str, buffer: Buffer, *, if_absent: bool = False) -> bool:
        item = {"key": {"S": key}, "value": {"B": bytes(self.check_value(key, buffer))}}
        condition = _ABSENT if if_absent else {}
        return self._call(self._client.put_item, key, Item=item, **condition) is not None

    def list(self, prefix: str) -> Iterator[str]:
        page: dict[str, Any] = {"ProjectionExpression": "#k", "ConsistentRead": True, **_KEY}
        if prefix:  # a text to compare with may not be empty
            page["FilterExpression"] = "begins_with(#k, :p)"
            page["ExpressionAttributeValues"] = {":p": {"S": prefix}}
        while True:
            answer = self._call(self._client.scan, prefix, **page)
            yield from (item["key"]["S"] for item in answer["Items"])
            if "LastEvaluatedKey" not in answer:
                return
            page["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    def delete(self, *keys: str) -> int:
        remove = self._client.delete_item
        answers = [self._call(remove, key, Key={"key": {"S": key}}, **_PRESENT) for key in keys]
        return sum(answer is not None for answer in answers)

    def _call(self, command: Callable[..., Any], key: str, **arguments: Any) -> Any:
        """The answer; None when a condition did not hold."""
        self._check_open()
        place = {"url": self.url, "key": key}
        try:
            return command(TableName=self._table, **arguments)
        except ClientError as err:
            code = err.response["Error"]["Code"]
            if code == "ConditionalCheckFailedException":
                return None
            if code == "ResourceNotFoundException":
                raise NotFoundError(f"{self.url}: no table {self._table}: create it", **place) from err
            raise UnavailableError(f"{key} at {self.url}: {err}", **place) from err
        except NoCredentialsError as err:
            raise AuthenticationError(f"{self.url}: {err}: see AWS_PROFILE", **place) from err
        except BotoCoreError as err:
            raise UnavailableError(f"{key} at {self.url}: {err}", **place) from err
