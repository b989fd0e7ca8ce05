package trace

import (
	"strings"
	"testing"
	"time"
)

// The embedded trace is the published one: row count, first and last row, time order.
func TestLoad(t *testing.T) {
	rows, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 19366 {
		t.Fatalf("%d rows, the published trace has 19366", len(rows))
	}
	if rows[0].Context != 374 || rows[0].Generated != 44 || rows[0].At != 0 {
		t.Fatalf("first row %+v", rows[0])
	}
	users := map[string]bool{}
	for i, r := range rows {
		if i > 0 && r.At < rows[i-1].At {
			t.Fatalf("row %d goes back in time", i)
		}
		users[r.User()] = true
	}
	if last := rows[len(rows)-1].At; last < 55*time.Minute || last > 65*time.Minute {
		t.Errorf("the trace spans %v, expected about an hour", last)
	}
	if len(users) < Users*9/10 {
		t.Errorf("only %d distinct users", len(users))
	}
}

// Broken rows are refused with their number.
func TestBroken(t *testing.T) {
	for _, text := range []string{"h,h,h\nnot a time,1,2\n", "h,h,h\n2023-11-16 18:15:46.6805900,x,2\n", "h,h,h\n2023-11-16 18:15:46.6805900,1,y\n", "h,h\n2023-11-16 18:15:46.6805900,1\n"} {
		if _, err := parse(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), "row 0") {
			t.Errorf("%q: got %v", text, err)
		}
	}
}
