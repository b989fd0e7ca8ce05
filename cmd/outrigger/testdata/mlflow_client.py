"""Drives MlflowClient against a control plane: URL of its HTTP port, file of a viewer's token."""
import os
import sys

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

url, operator, viewer = sys.argv[1:4]
os.environ["MLFLOW_TRACKING_TOKEN"] = operator
client = MlflowClient(tracking_uri=url, registry_uri=url)


def refused(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except MlflowException as e:
        assert e.error_code == code, f"{call.__name__}: {e.error_code} {e}, want {code}"
        return str(e)
    raise AssertionError(f"{call.__name__}{args} was not refused with {code}")


# Registered models.
m = client.create_registered_model("chat", tags={"team": "blue"}, description="answers")
assert (m.name, m.tags, m.description, m.latest_versions) == ("chat", {"team": "blue"}, "answers", []), m
assert 0 < m.creation_timestamp <= m.last_updated_timestamp
refused("RESOURCE_ALREADY_EXISTS", client.create_registered_model, "chat")
refused("RESOURCE_DOES_NOT_EXIST", client.get_registered_model, "nobody")
for name in ("charts", "summary"):
    client.create_registered_model(name)
assert client.update_registered_model("chat", "answers all").description == "answers all"
client.set_registered_model_tag("chat", "stage", "early")
client.delete_registered_model_tag("chat", "team")
assert client.get_registered_model("chat").tags == {"stage": "early"}
names = lambda page: [m.name for m in page]
assert names(client.search_registered_models()) == ["charts", "chat", "summary"]
assert names(client.search_registered_models("name LIKE 'cha%'", order_by=["name DESC"])) == ["chat", "charts"]
assert names(client.search_registered_models("name ILIKE 'CHA_' and tags.stage = 'early'")) == ["chat"]
assert "known are" in refused("INVALID_PARAMETER_VALUE", client.search_registered_models, "colour = 'red'")
first = client.search_registered_models(max_results=2)
assert names(first) == ["charts", "chat"] and first.token
assert names(client.search_registered_models(max_results=2, page_token=first.token)) == ["summary"]
refused("NOT_IMPLEMENTED", client.rename_registered_model, "chat", "talk")
refused("NOT_IMPLEMENTED", client.delete_registered_model, "chat")

# Versions. The second answers requests, and says where.
digest = "sha256:" + "0" * 64
v1 = client.create_model_version("chat", source=digest, run_id="r1", tags={"loss": "0.3"}, description="first")
assert (v1.version, v1.current_stage, v1.run_id, v1.status, v1.description) == (1, "None", "r1", "READY", "first") or v1.version == "1", v1
assert v1.tags["loss"] == "0.3" and v1.source == digest
assert client.get_model_version_download_uri("chat", "1") == f"{url}/v1/artifacts/{digest}"
v2 = client.create_model_version("chat", source="s3://bucket/v2", run_id="r2",
                                 tags={"outrigger.endpoints": "127.0.0.1:9001@eu, 127.0.0.1:9002"})
v3 = client.create_model_version("chat", source="s3://bucket/v3", tags={"outrigger.endpoints": "127.0.0.1:9003"})
assert client.get_model_version_download_uri("chat", "2") == "s3://bucket/v2"
refused("RESOURCE_DOES_NOT_EXIST", client.create_model_version, "nobody", source="s3://bucket/x")
refused("RESOURCE_DOES_NOT_EXIST", client.get_model_version, "chat", "9")
refused("INVALID_PARAMETER_VALUE", client.get_model_version, "chat", "newest")
versions = lambda found: [int(v.version) for v in found]
assert versions(client.search_model_versions("name = 'chat'", order_by=["version_number ASC"])) == [1, 2, 3]
assert versions(client.search_model_versions("name='chat' and version_number > 1 AND tags.`outrigger.state` = 'registered'",
                                             order_by=["version_number ASC"])) == [2, 3]
assert versions(client.search_model_versions("run_id = 'r2'")) == [2]
client.update_model_version("chat", "2", "second")
client.set_model_version_tag("chat", "2", "loss", "0.2")
client.set_model_version_tag("chat", "2", "spare", "x")
client.delete_model_version_tag("chat", "2", "spare")
got = client.get_model_version("chat", "2")
assert got.description == "second" and got.tags["loss"] == "0.2" and "spare" not in got.tags, got

# Stages are our states.
assert client.transition_model_version_stage("chat", "2", "Staging").current_stage == "Staging"
assert client.transition_model_version_stage("chat", "2", "production").current_stage == "Production"
refused("INVALID_STATE", client.transition_model_version_stage, "chat", "1", "Production")  # it could not answer
got = client.transition_model_version_stage("chat", "3", "Production", archive_existing_versions=True)
assert got.current_stage == "Production" and got.aliases == ["champion"], got
assert client.get_model_version("chat", "2").current_stage == "Archived"
assert "allowed" in refused("INVALID_STATE", client.transition_model_version_stage, "chat", "3", "Staging")
refused("INVALID_PARAMETER_VALUE", client.transition_model_version_stage, "chat", "3", "Beloved")
assert versions(client.get_latest_versions("chat", stages=["Production"])) == [3]
assert versions(client.get_registered_model("chat").latest_versions) == [1, 3, 2]

# Aliases are ours.
client.transition_model_version_stage("chat", "2", "None")
client.set_registered_model_alias("chat", "challenger", "2")
assert int(client.get_model_version_by_alias("chat", "challenger").version) == 2
assert {a: int(v) for a, v in client.get_registered_model("chat").aliases.items()} == {"challenger": 2, "champion": 3}
client.set_registered_model_alias("chat", "champion", "2")
assert client.get_model_version("chat", "2").current_stage == "Production"
client.delete_registered_model_alias("chat", "challenger")
refused("INVALID_PARAMETER_VALUE", client.get_model_version_by_alias, "chat", "challenger")
refused("INVALID_STATE", client.delete_registered_model_alias, "chat", "champion")
assert "champion" in refused("INVALID_PARAMETER_VALUE", client.set_registered_model_alias, "chat", "beloved", "2")

# Who may what.
os.environ["MLFLOW_TRACKING_TOKEN"] = viewer
assert client.get_registered_model("chat").name == "chat"
refused("PERMISSION_DENIED", client.create_registered_model, "mine")
refused("PERMISSION_DENIED", client.set_registered_model_alias, "chat", "champion", "3")
os.environ["MLFLOW_TRACKING_TOKEN"] = "guessed"
refused("UNAUTHENTICATED", client.get_registered_model, "chat")
print("PASS")
