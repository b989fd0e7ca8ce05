package status

import (
	"encoding/json"
	"errors"
	"net/http"

	"github.com/outrigger-mesh/outrigger"
)

type mlflowMapping struct {
	code string
	http int
}

// mlflow are MLflow's words (databricks.proto, ErrorCode) with the statuses its server
// sends (mlflow/exceptions.py), but for a change of state that is not allowed: MLflow calls
// that 500, which its own clients repeat for minutes.
var mlflow = map[outrigger.Kind]mlflowMapping{
	outrigger.Internal:     {"INTERNAL_ERROR", http.StatusInternalServerError},
	outrigger.Invalid:      {"INVALID_PARAMETER_VALUE", http.StatusBadRequest},
	outrigger.NotFound:     {"RESOURCE_DOES_NOT_EXIST", http.StatusNotFound},
	outrigger.Exists:       {"RESOURCE_ALREADY_EXISTS", http.StatusBadRequest},
	outrigger.Conflict:     {"RESOURCE_CONFLICT", http.StatusConflict},
	outrigger.Locked:       {"INVALID_STATE", http.StatusConflict},
	outrigger.Denied:       {"PERMISSION_DENIED", http.StatusForbidden},
	outrigger.Unauthorised: {"UNAUTHENTICATED", http.StatusUnauthorized},
	outrigger.Exhausted:    {"RESOURCE_EXHAUSTED", http.StatusTooManyRequests},
	outrigger.Unavailable:  {"TEMPORARILY_UNAVAILABLE", http.StatusServiceUnavailable},
	outrigger.Unknown:      {"INTERNAL_ERROR", http.StatusInternalServerError},
	outrigger.Stale:        {"TEMPORARILY_UNAVAILABLE", http.StatusServiceUnavailable},
	outrigger.Cancelled:    {"CANCELLED", 499},
	outrigger.Timeout:      {"DEADLINE_EXCEEDED", http.StatusGatewayTimeout},
}

// ErrNotImplemented marks what MLflow's interface has and this mesh does not.
var ErrNotImplemented = errors.New("not implemented")

// WriteMLflow writes err as MLflow's REST interface does: {"error_code", "message"}.
func WriteMLflow(w http.ResponseWriter, err error) {
	err = FromGRPC(err, nil)
	k := kindOf(err)
	to, text := mlflow[k], message(k, err)
	if errors.Is(err, ErrNotImplemented) {
		to = mlflowMapping{"NOT_IMPLEMENTED", http.StatusNotImplemented}
	}
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		to = mlflowMapping{"INVALID_PARAMETER_VALUE", http.StatusRequestEntityTooLarge}
	}
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(to.http)
	// The status line is out; a failed body write has nobody left to tell.
	_ = json.NewEncoder(w).Encode(map[string]string{"error_code": to.code, "message": text})
}
