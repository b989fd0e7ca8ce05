package http2

import "time"

// What a connection may do that moves no call forward; see the package comment.
const (
	budgetMax    = 10_000
	budgetRefill = 1000 // a second
)

// budget is the allowance of one connection.
type budget struct {
	left int
	at   time.Time // of the last refill
}

// spend takes n and reports whether that was allowed.
func (b *budget) spend(n int, now time.Time) bool {
	if b.left < n {
		if d := now.Sub(b.at); d > 0 {
			b.earn(int(min(d, budgetMax/budgetRefill*time.Second) * budgetRefill / time.Second))
			b.at = now
		}
	}
	b.left -= n
	if b.left < 0 {
		b.left = 0
		return false
	}
	return true
}

// earn gives n back, for what moved a call forward.
func (b *budget) earn(n int) { b.left = min(b.left+n, budgetMax) }
