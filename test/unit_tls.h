static void test_judge(void) { row("todo", true, "x"); }
static void test_sessions(void) { row("todo", true, "x"); }
