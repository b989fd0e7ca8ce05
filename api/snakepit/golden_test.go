package snakepit_test

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

var update = flag.Bool("update", false, "write testdata/messages.txt where it does not exist")

// published is the field table of snakepit v0.4.3, the last release with variables:
// "number name type" of every field. It is written down independently of our .proto file,
// which must agree with it in every row and add nothing below number 100.
var published = map[string][]string{
	"PingRequest":  {"1 message string"},
	"PingResponse": {"1 message string", "2 server_time Timestamp"},

	"InitializeSessionRequest":  {"1 session_id string", "2 metadata map<string,string>", "3 config SessionConfig"},
	"SessionConfig":             {"1 enable_caching bool", "2 cache_ttl_seconds int32", "3 enable_telemetry bool"},
	"InitializeSessionResponse": {"1 success bool", "2 error_message string", "3 available_tools map<string,ToolSpec>", "4 initial_variables map<string,Variable>"},
	"CleanupSessionRequest":     {"1 session_id string", "2 force bool"},
	"CleanupSessionResponse":    {"1 success bool", "2 resources_cleaned int32"},
	"GetSessionRequest":         {"1 session_id string"},
	"GetSessionResponse":        {"1 session_id string", "2 metadata map<string,string>", "3 created_at Timestamp", "4 variable_count int32", "5 tool_count int32"},
	"HeartbeatRequest":          {"1 session_id string", "2 client_time Timestamp"},
	"HeartbeatResponse":         {"1 server_time Timestamp", "2 session_valid bool"},

	"Variable": {"1 id string", "2 name string", "3 type string", "4 value Any", "5 constraints_json string", "6 metadata map<string,string>",
		"7 source Source", "8 last_updated_at Timestamp", "9 version int32", "10 access_control_json string",
		"11 optimization_status OptimizationStatus", "12 binary_value bytes"},
	"OptimizationStatus": {"1 optimizing bool", "2 optimizer_id string", "3 started_at Timestamp"},
	"RegisterVariableRequest": {"1 session_id string", "2 name string", "3 type string", "4 initial_value Any", "5 constraints_json string",
		"6 metadata map<string,string>", "7 initial_binary_value bytes"},
	"RegisterVariableResponse": {"1 success bool", "2 variable_id string", "3 error_message string"},
	"GetVariableRequest":       {"1 session_id string", "2 variable_identifier string", "3 bypass_cache bool"},
	"GetVariableResponse":      {"1 variable Variable", "2 from_cache bool"},
	"SetVariableRequest": {"1 session_id string", "2 variable_identifier string", "3 value Any", "4 metadata map<string,string>",
		"5 expected_version int32", "6 binary_value bytes"},
	"SetVariableResponse":       {"1 success bool", "2 error_message string", "3 new_version int32"},
	"BatchGetVariablesRequest":  {"1 session_id string", "2 variable_identifiers string*", "3 include_metadata bool", "4 bypass_cache bool"},
	"BatchGetVariablesResponse": {"1 variables map<string,Variable>", "2 missing_variables string*"},
	"BatchSetVariablesRequest": {"1 session_id string", "2 updates map<string,Any>", "3 metadata map<string,string>", "4 atomic bool",
		"5 binary_updates map<string,bytes>"},
	"BatchSetVariablesResponse": {"1 success bool", "2 errors map<string,string>", "3 new_versions map<string,int32>"},
	"ListVariablesRequest":      {"1 session_id string", "2 pattern string"},
	"ListVariablesResponse":     {"1 variables Variable*"},
	"DeleteVariableRequest":     {"1 session_id string", "2 variable_identifier string"},
	"DeleteVariableResponse":    {"1 success bool", "2 error_message string"},

	"WatchVariablesRequest": {"1 session_id string", "2 variable_identifiers string*", "3 include_initial_values bool"},
	"VariableUpdate": {"1 variable_id string", "2 variable Variable", "3 update_source string", "4 update_metadata map<string,string>",
		"5 timestamp Timestamp", "6 update_type string"},

	"AddDependencyRequest":       {"1 session_id string", "2 from_variable string", "3 to_variable string", "4 dependency_type string"},
	"AddDependencyResponse":      {"1 success bool", "2 error_message string"},
	"StartOptimizationRequest":   {"1 session_id string", "2 variable_identifier string", "3 optimizer_id string", "4 optimizer_config map<string,string>"},
	"StartOptimizationResponse":  {"1 success bool", "2 error_message string", "3 optimization_id string"},
	"StopOptimizationRequest":    {"1 session_id string", "2 variable_identifier string", "3 force bool"},
	"StopOptimizationResponse":   {"1 success bool", "2 final_value Any"},
	"GetVariableHistoryRequest":  {"1 session_id string", "2 variable_identifier string", "3 limit int32"},
	"GetVariableHistoryResponse": {"1 entries VariableHistoryEntry*"},
	"VariableHistoryEntry":       {"1 version int32", "2 value Any", "3 timestamp Timestamp", "4 changed_by string", "5 metadata map<string,string>"},
	"RollbackVariableRequest":    {"1 session_id string", "2 variable_identifier string", "3 target_version int32"},
	"RollbackVariableResponse":   {"1 success bool", "2 variable Variable", "3 error_message string"},

	// Tools are none of our business: the published fields stay unknown and are kept.
	"ToolSpec": nil,
}

// methods are the published calls we serve. The five tool calls must stay undeclared:
// undeclared calls are forwarded byte for byte.
var methods = map[string]string{
	"Ping":               "PingRequest → PingResponse",
	"InitializeSession":  "InitializeSessionRequest → InitializeSessionResponse",
	"CleanupSession":     "CleanupSessionRequest → CleanupSessionResponse",
	"GetSession":         "GetSessionRequest → GetSessionResponse",
	"Heartbeat":          "HeartbeatRequest → HeartbeatResponse",
	"RegisterVariable":   "RegisterVariableRequest → RegisterVariableResponse",
	"GetVariable":        "GetVariableRequest → GetVariableResponse",
	"SetVariable":        "SetVariableRequest → SetVariableResponse",
	"GetVariables":       "BatchGetVariablesRequest → BatchGetVariablesResponse",
	"SetVariables":       "BatchSetVariablesRequest → BatchSetVariablesResponse",
	"ListVariables":      "ListVariablesRequest → ListVariablesResponse",
	"DeleteVariable":     "DeleteVariableRequest → DeleteVariableResponse",
	"WatchVariables":     "WatchVariablesRequest → stream VariableUpdate",
	"AddDependency":      "AddDependencyRequest → AddDependencyResponse",
	"StartOptimization":  "StartOptimizationRequest → StartOptimizationResponse",
	"StopOptimization":   "StopOptimizationRequest → StopOptimizationResponse",
	"GetVariableHistory": "GetVariableHistoryRequest → GetVariableHistoryResponse",
	"RollbackVariable":   "RollbackVariableRequest → RollbackVariableResponse",
}

func TestMethods(t *testing.T) {
	services := snakepit.File_snakepit_snakepit_bridge_proto.Services()
	if services.Len() != 1 || services.Get(0).FullName() != "snakepit.bridge.BridgeService" {
		t.Fatalf("services are %v", services)
	}
	got := map[string]string{}
	list := services.Get(0).Methods()
	for i := range list.Len() {
		m := list.Get(i)
		answer := string(m.Output().Name())
		if m.IsStreamingServer() {
			answer = "stream " + answer
		}
		if m.IsStreamingClient() {
			answer += " (and the client streams)"
		}
		got[string(m.Name())] = string(m.Input().Name()) + " → " + answer
	}
	if !maps.Equal(got, methods) {
		t.Errorf("methods are %v\nwant %v", got, methods)
	}
	if got := snakepit.BridgeService_GetVariable_FullMethodName; got != "/snakepit.bridge.BridgeService/GetVariable" {
		t.Errorf("the path of GetVariable is %s", got)
	}
}

// TestFields: every published row is in the descriptors, and they hold nothing else that
// snakepit could take for its own.
func TestFields(t *testing.T) {
	const ours = 100 // the first number for additions
	list := snakepit.File_snakepit_snakepit_bridge_proto.Messages()
	seen := map[string]bool{}
	for i := range list.Len() {
		m := list.Get(i)
		rows, ok := published[string(m.Name())]
		if !ok {
			t.Errorf("%s is not in the published protocol", m.Name())
		}
		seen[string(m.Name())] = true
		var got []string
		for j := range m.Fields().Len() {
			if f := m.Fields().Get(j); f.Number() < ours {
				got = append(got, fmt.Sprintf("%d %s %s", f.Number(), f.Name(), typeOf(f)))
			}
		}
		if !slices.Equal(got, rows) {
			t.Errorf("%s has the fields\n%q\nbut\n%q are published", m.Name(), got, rows)
		}
	}
	for name := range published {
		if !seen[name] {
			t.Errorf("%s is published but not declared", name)
		}
	}
	source := snakepit.Variable_Source(0).Descriptor()
	if source.Values().Len() != 2 || source.Values().ByName("ELIXIR").Number() != 0 || source.Values().ByName("PYTHON").Number() != 1 {
		t.Errorf("sources are %v", source.Values())
	}
}

func typeOf(f protoreflect.FieldDescriptor) string {
	one := func(f protoreflect.FieldDescriptor) string {
		switch {
		case f.Message() != nil:
			return string(f.Message().Name())
		case f.Enum() != nil:
			return string(f.Enum().Name())
		}
		return f.Kind().String()
	}
	switch {
	case f.IsMap():
		return fmt.Sprintf("map<%s,%s>", one(f.MapKey()), one(f.MapValue()))
	case f.IsList():
		return one(f) + "*"
	case f.ContainingOneof() != nil:
		return one(f) + " in a oneof" // optional included: presence was not published
	}
	return one(f)
}

// wireOf writes a message by the published table alone, with every field set.
func wireOf(message string) []byte {
	switch message { // the two well-known types
	case "Timestamp":
		return protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 1_700_000_000)
	case "Any":
		b := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "type.googleapis.com/snakepit.float")
		return protowire.AppendString(protowire.AppendTag(b, 2, protowire.BytesType), "0.7") // JSON, not a message
	case "ToolSpec":
		return protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "search")
	}
	var out []byte
	for _, row := range published[message] {
		var number protowire.Number
		var name, typ string
		if _, err := fmt.Sscanf(row, "%d %s %s", &number, &name, &typ); err != nil {
			panic(err)
		}
		typ = strings.TrimSuffix(typ, "*")
		if value, ok := strings.CutPrefix(typ, "map<string,"); ok {
			entry := appendField(nil, 1, "string", "k")
			entry = appendField(entry, 2, strings.TrimSuffix(value, ">"), "v")
			out = protowire.AppendBytes(protowire.AppendTag(out, number, protowire.BytesType), entry)
			continue
		}
		out = appendField(out, number, typ, name)
	}
	return out
}

func appendField(b []byte, number protowire.Number, typ, text string) []byte {
	switch typ {
	case "string", "bytes":
		return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), text)
	case "bool", "Source":
		return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), 1)
	case "int32":
		return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), 300)
	}
	return protowire.AppendBytes(protowire.AppendTag(b, number, protowire.BytesType), wireOf(typ))
}

// TestGoldenBytes: bytes made from the published table, and kept in testdata, are read
// without a rest and written as the same bytes again.
func TestGoldenBytes(t *testing.T) {
	const file = "testdata/messages.txt"
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(published)) {
		raw := wireOf(name)
		fmt.Fprintf(&text, "%s %s\n", name, hex.EncodeToString(raw))
		d := snakepit.File_snakepit_snakepit_bridge_proto.Messages().ByName(protoreflect.Name(name))
		if d == nil {
			t.Errorf("%s is not declared", name)
			continue
		}
		m := dynamicpb.NewMessage(d)
		if err := proto.Unmarshal(raw, m); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if name != "ToolSpec" && len(m.GetUnknown()) > 0 {
			t.Errorf("%s: %x is not understood", name, m.GetUnknown())
		}
		again, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil || !bytes.Equal(again, raw) {
			t.Errorf("%s: written again as\n%x\nwant\n%x, %v", name, again, raw, err)
		}
	}
	want, err := os.ReadFile(file)
	if os.IsNotExist(err) && *update {
		err = os.WriteFile(file, []byte(text.String()), 0o644)
		want = []byte(text.String())
	}
	if err != nil {
		t.Fatal(err)
	}
	if text.String() != string(want) {
		t.Errorf("%s holds\n%s\nthe table makes\n%s\nThe protocol of another program does not change: the table or the encoder of this test did.", file, want, text.String())
	}
}

// Fields of tools and of later versions survive a message that is read and written again.
func TestUnknownFieldsSurvive(t *testing.T) {
	raw := append(wireOf("InitializeSessionResponse"), protowire.AppendString(protowire.AppendTag(nil, 77, protowire.BytesType), "later")...)
	var m snakepit.InitializeSessionResponse
	if err := proto.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(&m)
	if err != nil || !bytes.Equal(again, raw) {
		t.Errorf("%x\n%x, %v", again, raw, err)
	}
	if !bytes.Contains(again, []byte("search")) {
		t.Error("the tool's name is lost")
	}
}

// Any.value is raw JSON: nobody may treat it as a message.
func TestAnyIsOpaque(t *testing.T) {
	var v snakepit.Variable
	if err := proto.Unmarshal(wireOf("Variable"), &v); err != nil {
		t.Fatal(err)
	}
	if string(v.GetValue().GetValue()) != "0.7" || v.GetValue().GetTypeUrl() != "type.googleapis.com/snakepit.float" {
		t.Errorf("%q %q", v.GetValue().GetTypeUrl(), v.GetValue().GetValue())
	}
	if _, err := v.GetValue().UnmarshalNew(); err == nil {
		t.Error("JSON was taken for a message")
	}
}
