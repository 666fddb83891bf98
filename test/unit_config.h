static void test_config(void) { row("todo", true, "x"); }
