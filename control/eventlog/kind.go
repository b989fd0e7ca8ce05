package eventlog

import (
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// EventKind returns the field name of the event's payload, for example
// "rollback_started": the word audit filters, metrics and dashboards use. It is ""
// for nil and for an event without a payload (or with one from a newer schema).
func EventKind(e *outriggerv1.Event) string {
	m := e.ProtoReflect()
	if !m.IsValid() {
		return ""
	}
	oneof := m.Descriptor().Oneofs().ByName("payload")
	fd := m.WhichOneof(oneof)
	if fd == nil {
		return ""
	}
	return string(fd.Name())
}
