// Package outriggerv1 is Outrigger's own wire API: variables, coherence (origin reads
// and the change feed), reports, administration, the event envelope and the typed xDS
// resources. The .proto files beside the generated code are the documentation; field
// numbers are frozen.
package outriggerv1
